"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight. Zhang & Sennrich 2019."""

from __future__ import annotations

import torch
from torch.nn import functional

from accel.kernels.choice import use_triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise each row. Computed in float32 and rounded once, to x's dtype.

    Args:
        x: [T, H], any floating dtype.
        weight: [H].

    Returns:
        [T, H], of x's dtype.
    """
    if use_triton(x):
        from accel.kernels.rms_norm_triton import rms_norm_triton as norm
    else:
        norm = rms_norm_reference
    return norm(x, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual += x in place, and its norm, as rms_norm(residual, weight, eps).

    Args:
        x: [T, H].
        residual: [T, H], of x's dtype; the sum is rounded to it before the norm is taken.
        weight: [H].

    Returns:
        [T, H], of x's dtype.
    """
    if use_triton(x):
        from accel.kernels.rms_norm_triton import add_rms_norm_triton as add_norm
    else:
        add_norm = add_rms_norm_reference
    return add_norm(x, residual, weight, eps)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own, for any device."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm_reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Two passes of torch, for any device."""
    return rms_norm_reference(residual.add_(x), weight, eps)
