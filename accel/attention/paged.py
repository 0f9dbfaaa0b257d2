"""Attention over keys and values in pages (PagedAttention, Kwon et al. 2023).

Shapes: N pages of S tokens, M pages of a table's row; the rest as in accel.attention.reference. Only the first
ceil(length / S) entries of a table's row are read, and no cached token at or beyond the length.
"""

from __future__ import annotations

import torch

from accel.attention.reference import RowsOf, decode_plan, prefill_plan, run_decode, run_prefill
from accel.kernels.choice import use_triton
from accel.kernels.kv_write import rows_of


def paged_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One new token of each sequence attends to its whole context, itself included.

    Args:
        q: [B, Hq, D].
        keys, values: [N, S, Hkv, D] of q's dtype.
        tables: [B, M] int32, pages of each sequence.
        lengths: [B] int32, tokens of context; 0: the row is padding and comes back as zeros.
        scale: factor of the scores, usually D ** -0.5.
        out: [B, Hq, D] contiguous, where the result goes; None: new memory.

    Returns:
        [B, Hq, D].
    """
    if use_triton(q):
        from accel.attention.paged_triton import paged_decode_triton as decode
    else:
        decode = paged_decode_reference
    return decode(q, keys, values, tables, lengths, scale, out)


def paged_prefill(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The new tokens of each sequence, the last of its context, attend to what is before them and to themselves.

    Args:
        q: [T, Hq, D]; those of sequence b are q[starts[b] : starts[b + 1]].
        keys, values: [N, S, Hkv, D] of q's dtype.
        tables: [B, M] int32, pages of each sequence.
        starts: [B + 1] int32, starting at 0 and ascending; rows of q from starts[B] on come back as zeros.
        lengths: [B] int32, tokens of context, the new ones included.
        scale, out: as in paged_decode.

    Returns:
        [T, Hq, D].
    """
    if use_triton(q):
        from accel.attention.paged_triton import paged_prefill_triton as prefill
    else:
        prefill = paged_prefill_reference
    return prefill(q, keys, values, tables, starts, lengths, scale, out)


def paged_decode_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """paged_decode in plain torch, for any device. On a GPU it waits for the lengths."""
    plan = decode_plan(rows_in_pages(tables, keys.shape[1]), lengths, q.dtype)
    return run_decode(q, rows_of(keys), rows_of(values), plan, scale, out)


def paged_prefill_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """paged_prefill in plain torch, for any device. On a GPU it waits for the lengths."""
    plan = prefill_plan(rows_in_pages(tables, keys.shape[1]), starts, lengths, q.dtype)
    return run_prefill(q, rows_of(keys), rows_of(values), plan, scale, out)


def rows_in_pages(tables: torch.Tensor, page_size: int) -> RowsOf:
    """Where positions of sequences lie in a cache of pages, flattened to rows."""

    def rows(sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        pages = tables[sequences].long().gather(1, positions // page_size)
        return pages * page_size + positions % page_size

    return rows
