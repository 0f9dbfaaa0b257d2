"""Whether an operation runs as its Triton kernel or as its torch reference."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def use_triton(tensor: torch.Tensor) -> bool:
    """Kernels run on CUDA tensors where Triton is installed."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
