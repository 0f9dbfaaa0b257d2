"""RMSNorm on a GPU: one program a row, which it reads once."""

# Triton's functions take tensors and pointers that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As accel.kernels.rms_norm.rms_norm."""
    y = x.new_empty(x.shape)
    _launch(x, x, weight, y, eps, adds=False)
    return y


def add_rms_norm_triton(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As accel.kernels.rms_norm.add_rms_norm."""
    y = x.new_empty(x.shape)
    _launch(x, residual, weight, y, eps, adds=True)
    return y


def _launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, eps: float, adds: bool
) -> None:
    rows, size = x.shape
    block = triton.next_power_of_2(size)
    _kernel[(rows,)](
        x,
        *x.stride(),
        residual,
        *residual.stride(),
        weight,
        y,
        size,
        eps,
        ADDS=adds,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),
    )


@triton.jit
def _kernel(
    x_ptr,
    x_row,
    x_column,
    residual_ptr,
    residual_row,
    residual_column,
    weight_ptr,
    y_ptr,
    size,
    eps,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """If ADDS: residual <- residual + x, x <- residual. Then y = x / sqrt(mean(x^2) + eps) * weight, for one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + row * x_row + columns * x_column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        at = residual_ptr + row * residual_row + columns * residual_column
        total = (tl.load(at, mask=inside, other=0.0).to(tl.float32) + x).to(residual_ptr.dtype.element_ty)
        tl.store(at, total, mask=inside)
        x = total.to(tl.float32)  # what later layers will read, rounding included
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * size + columns, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=inside)
