"""SwiGLU on a GPU: one pass over the fused projection."""

# Triton's functions take tensors and pointers that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def swiglu_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """As accel.kernels.swiglu.swiglu."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, size)
    _kernel[(rows, triton.cdiv(size, _BLOCK))](gate_up, *gate_up.stride(), y, size, BLOCK=_BLOCK)
    return y


@triton.jit
def _kernel(gate_up_ptr, gate_up_row, gate_up_column, y_ptr, size, BLOCK: tl.constexpr):
    """y = gate / (1 + exp(-gate)) * up. Program (i, j) does block j of row i."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    at_gate = gate_up_ptr + row * gate_up_row + columns * gate_up_column
    gate = tl.load(at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at_gate + size * gate_up_column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * size + columns, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=inside)
