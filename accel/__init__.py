"""Tensors: samplers, kernels and device memory. Knows nothing of requests or of cache keys."""
