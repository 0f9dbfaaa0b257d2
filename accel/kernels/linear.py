"""A matrix product with weights, y = x W^T; on the CPU with W laid out once as oneDNN reads it fastest.

oneDNN works on blocks. Given a plain matrix, it rearranges it in every call or runs a slower kernel; which of the two
shows with a few rows and more, as in decoding a batch.
"""

from __future__ import annotations

import torch
from torch.nn import functional

ROWS = 64  # that the layout is chosen for; it was the best or nearly so from 1 to 400


def packed(weight: torch.Tensor) -> torch.Tensor:
    """The weight in oneDNN's layout, for `linear` alone; itself where that is of no use.

    Args:
        weight: [N, K], on any device; float32 and bfloat16 are packed.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if _packs(weight) else weight


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, K] -> [T, N], of x's dtype, which is the weight's.

    Args:
        weight: [N, K], packed or plain.
    """
    if not weight.is_mkldnn:
        return functional.linear(x, weight)
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


def _packs(weight: torch.Tensor) -> bool:
    """Whether this torch and this processor have what it takes. The operations are those that torch.compile emits."""
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
