"""The gate of a feed-forward layer: silu(gate) * up. Shazeer 2020, "GLU variants improve Transformer"."""

from __future__ import annotations

import torch
from torch.nn import functional

from accel.kernels.choice import use_triton


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the two halves of each row.

    Args:
        gate_up: [T, 2 F], gate first; any floating dtype.

    Returns:
        [T, F], of the same dtype.
    """
    if use_triton(gate_up):
        from accel.kernels.swiglu_triton import swiglu_triton as gated
    else:
        gated = swiglu_reference
    return gated(gate_up)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """In plain torch, for any device. Below float32, silu(gate) is rounded once more than in the kernel."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
