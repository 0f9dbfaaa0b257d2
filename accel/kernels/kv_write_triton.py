"""The KV write on a GPU: one program a token, without waiting to see which are skipped."""

# Triton's functions take tensors and pointers that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl


def kv_write_triton(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """As accel.kernels.kv_write.kv_write, over flattened keys and values [rows, Hkv, D]."""
    tokens, heads, dim = k.shape
    heads_block, dim_block = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    _kernel[(tokens,)](
        k,
        *k.stride(),
        v,
        *v.stride(),
        keys,
        *keys.stride(),
        values,
        *values.stride(),
        slots,
        heads,
        dim,
        HEADS=heads_block,
        DIM=dim_block,
        num_warps=min(max(heads_block * dim_block // 256, 1), 16),
    )


@triton.jit
def _kernel(
    k_ptr,
    k_row,
    k_head,
    k_column,
    v_ptr,
    v_row,
    v_head,
    v_column,
    keys_ptr,
    keys_row,
    keys_head,
    keys_column,
    values_ptr,
    values_row,
    values_head,
    values_column,
    slots_ptr,
    heads,
    dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    """keys[slot] <- k[i], values[slot] <- v[i] for token i; nothing where slot < 0."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)  # slot * row can pass 2^31
    if slot >= 0:
        head = tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, DIM)[None, :]
        inside = (head < heads) & (column < dim)
        k = tl.load(k_ptr + token * k_row + head * k_head + column * k_column, mask=inside)
        v = tl.load(v_ptr + token * v_row + head * v_head + column * v_column, mask=inside)
        tl.store(keys_ptr + slot * keys_row + head * keys_head + column * keys_column, k, mask=inside)
        tl.store(values_ptr + slot * values_row + head * values_head + column * values_column, v, mask=inside)
