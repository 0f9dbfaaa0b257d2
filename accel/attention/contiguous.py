"""Attention over keys and values that are contiguous for each sequence.

Shapes: `slots` sequences have room for Lmax tokens each; the rest as in accel.attention.reference. No cached token at
or beyond a sequence's length is read: that memory may not be mapped (accel.memory.virtual_kv).
"""

from __future__ import annotations

import torch

from accel.attention.reference import RowsOf, decode_plan, prefill_plan, run_decode, run_prefill
from accel.kernels.choice import use_triton
from accel.kernels.kv_write import rows_of


def contiguous_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As accel.attention.paged.paged_decode, over keys and values [slots, Lmax, Hkv, D] and slots [B] int32 or int64.

    The first two dimensions of keys and values flatten without a copy.
    """
    if use_triton(q):
        from accel.attention.paged_triton import paged_decode_triton

        return paged_decode_triton(q, keys, values, slots.unsqueeze(1), lengths, scale, out)  # a page a sequence
    return contiguous_decode_reference(q, keys, values, slots, lengths, scale, out)


def contiguous_prefill(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As accel.attention.paged.paged_prefill, over keys and values [slots, Lmax, Hkv, D] and slots [B]."""
    if use_triton(q):
        from accel.attention.paged_triton import paged_prefill_triton

        return paged_prefill_triton(q, keys, values, slots.unsqueeze(1), starts, lengths, scale, out)
    return contiguous_prefill_reference(q, keys, values, slots, starts, lengths, scale, out)


def contiguous_decode_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """contiguous_decode in plain torch, for any device. On a GPU it waits for the lengths."""
    plan = decode_plan(rows_in_slots(slots, keys.shape[1]), lengths, q.dtype)
    return run_decode(q, rows_of(keys), rows_of(values), plan, scale, out)


def contiguous_prefill_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """contiguous_prefill in plain torch, for any device. On a GPU it waits for the lengths."""
    plan = prefill_plan(rows_in_slots(slots, keys.shape[1]), starts, lengths, q.dtype)
    return run_prefill(q, rows_of(keys), rows_of(values), plan, scale, out)


def rows_in_slots(slots: torch.Tensor, room: int) -> RowsOf:
    """Where positions of sequences lie in a cache of slots with room for so many tokens, flattened to rows."""

    def rows(sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return slots[sequences].long().unsqueeze(1) * room + positions

    return rows
