"""Fused operations. A file holds one operation: its torch reference and the choice between that and the Triton kernel,
which has a file of its own because Triton is not installed everywhere and is slow to import."""
