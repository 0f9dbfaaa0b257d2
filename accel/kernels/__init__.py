"""Fused operations. A file holds one operation: its torch reference and the choice between that and the Triton kernel,
which has a file of its own because Triton is not installed everywhere and is slow to import."""

import os

# A product and a sum are one instruction, as by default so far; Triton 3.9 warns where nothing is said, 3.10 says no.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
