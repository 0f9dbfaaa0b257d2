"""RoPE on a GPU: one program a token turns all its queries and keys, reading its angles once."""

# Triton's functions take tensors and pointers that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl


def rope_triton(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> None:
    """As accel.kernels.rope.rope."""
    tokens, query_heads, dim = q.shape
    kv_heads = k.shape[1]
    heads_block, half_block = triton.next_power_of_2(query_heads), triton.next_power_of_2(dim // 2)
    _kernel[(tokens,)](
        q,
        *q.stride(),
        k,
        *k.stride(),
        table,
        positions,
        query_heads,
        kv_heads,
        dim // 2,
        QUERY_HEADS=heads_block,
        KV_HEADS=triton.next_power_of_2(kv_heads),
        HALF=half_block,
        num_warps=min(max(heads_block * half_block // 256, 1), 16),
    )


@triton.jit
def _kernel(
    q_ptr,
    q_row,
    q_head,
    q_column,
    k_ptr,
    k_row,
    k_head,
    k_column,
    table_ptr,
    positions_ptr,
    query_heads,
    kv_heads,
    half,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """(x, y) <- (x cos - y sin, y cos + x sin) for the halves x, y of every head of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    at_angles = table_ptr + tl.load(positions_ptr + token).to(tl.int64) * 2 * half + column
    cos = tl.load(at_angles, mask=column < half, other=0.0)
    sin = tl.load(at_angles + half, mask=column < half, other=0.0)
    _turn(q_ptr + token * q_row, q_head, q_column, query_heads, half, cos, sin, QUERY_HEADS, HALF)
    _turn(k_ptr + token * k_row, k_head, k_column, kv_heads, half, cos, sin, KV_HEADS, HALF)


@triton.jit
def _turn(x_ptr, x_head, x_column, heads, half, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr):
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    at_first = x_ptr + head * x_head + column * x_column
    at_second = at_first + half * x_column
    first = tl.load(at_first, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at_second, mask=inside, other=0.0).to(tl.float32)
    tl.store(at_first, (first * cos - second * sin).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(at_second, (second * cos + first * sin).to(x_ptr.dtype.element_ty), mask=inside)
