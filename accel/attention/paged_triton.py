"""Attention over pages on a GPU: flash-decoding (split over the context, merged by log-sum-exp) and flash prefill.

The query heads of a group share their keys and values: a program loads those once for all of them. A cache that is
contiguous for each sequence is one whose tables have one page a row; its pages may be of any size.
"""

# Triton's functions take tensors and pointers that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

_SHORTEST_SPAN = 128  # tokens of context worth a program of their own
_MOST_SPLITS = 64
_TILE_BYTES = 16384  # of keys, and of values, that a program loads at a time
_QUERY_ROWS = 64  # (query, head) pairs of a prefill program
_DOT = 16  # the least that a side of tl.dot may be


def paged_decode_triton(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As accel.attention.paged.paged_decode. Launches depend on shapes alone, so a graph may capture them."""
    sequences, heads, dim = q.shape
    page_size, kv_heads = keys.shape[1:3]
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if sequences == 0:
        return out
    capacity = tables.shape[1] * page_size
    splits = min(
        max(_programs(q.device) // (sequences * kv_heads), 1), triton.cdiv(capacity, _SHORTEST_SPAN), _MOST_SPLITS
    )
    block = _block(dim, q.dtype)
    if splits > 1:
        partial = torch.empty(sequences, heads, splits, dim, dtype=torch.float32, device=q.device)
        weights = torch.empty(sequences, heads, splits, dtype=torch.float32, device=q.device)
    else:
        partial = weights = out
    group = heads // kv_heads
    _decode_kernel[(sequences, kv_heads, splits)](
        q,
        *q.stride()[:2],
        keys,
        *keys.stride()[:3],
        values,
        *values.stride()[:3],
        tables,
        tables.stride(0),
        lengths,
        partial,
        weights,
        scale * _LOG2_E,
        splits,
        DIM=dim,
        DIM_PADDED=_padded(dim),
        GROUP=group,
        GROUP_PADDED=_padded(group),
        PAGE=_page(tables, page_size),
        BLOCK=block,
        SHORTEST=_SHORTEST_SPAN,
        SPLIT=splits > 1,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _merge_kernel[(sequences, heads)](
            partial,
            weights,
            lengths,
            out,
            splits,
            DIM=dim,
            DIM_PADDED=_padded(dim),
            SPLITS_PADDED=triton.next_power_of_2(splits),
            BLOCK=block,
            SHORTEST=_SHORTEST_SPAN,
            num_warps=4,
        )
    return out


def paged_prefill_triton(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As accel.attention.paged.paged_prefill."""
    tokens, heads, dim = q.shape
    page_size, kv_heads = keys.shape[1:3]
    sequences = len(lengths)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    out.zero_()  # which rows no sequence owns is known on the device alone
    if tokens == 0 or sequences == 0:
        return out
    group = heads // kv_heads
    rows = max(_QUERY_ROWS, triton.next_power_of_2(group))
    queries = rows // group
    # Sequence b has the blocks from starts[b] // queries + b on: at least as many as it needs, whatever starts are.
    _prefill_kernel[(tokens // queries + sequences, kv_heads)](
        q,
        *q.stride()[:2],
        keys,
        *keys.stride()[:3],
        values,
        *values.stride()[:3],
        tables,
        tables.stride(0),
        starts,
        lengths,
        out,
        scale * _LOG2_E,
        sequences,
        DIM=dim,
        DIM_PADDED=_padded(dim),
        GROUP=group,
        ROWS=rows,
        QUERIES=queries,
        SEQUENCES_PADDED=triton.next_power_of_2(sequences),
        PAGE=_page(tables, page_size),
        BLOCK=_block(dim, q.dtype),
        num_warps=4,
        num_stages=2,
    )
    return out


_LOG2_E = 1.4426950408889634  # exp(x) = exp2(x log2(e)), and exp2 is one instruction


def _padded(size: int) -> int:
    return max(int(triton.next_power_of_2(size)), _DOT)


def _block(dim: int, dtype: torch.dtype) -> int:
    """Tokens whose keys a program loads at a time."""
    return min(max(_TILE_BYTES // (_padded(dim) * dtype.itemsize), _DOT), 64)


def _page(tables: torch.Tensor, page_size: int) -> int:
    """Tokens of a page; 0: every sequence has one page, and its size need not be known to the kernel."""
    return 0 if tables.shape[1] == 1 else page_size


@cache
def _programs(device: torch.device) -> int:
    """Programs that keep a device busy."""
    if device.type == "cuda":
        return 4 * int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 16


@triton.jit
def _span(length, splits, BLOCK: tl.constexpr, SHORTEST: tl.constexpr):
    """Tokens of context of each split, but perhaps the last one that has any."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK, SHORTEST)


@triton.jit
def _places(table_ptr, tokens, inside, page_stride, place_stride, PAGE: tl.constexpr):
    """Offsets [BLOCK] int64 of cached tokens. Nothing of the table is read but the pages of tokens inside."""
    if PAGE == 0:
        return tl.load(table_ptr).to(tl.int64) * page_stride + tokens.to(tl.int64) * place_stride
    else:
        pages = tl.load(table_ptr + tokens // PAGE, mask=inside, other=0).to(tl.int64)
        return pages * page_stride + (tokens % PAGE).to(tl.int64) * place_stride


@triton.jit
def _attend(q, k, v, visible, scale, highest, total, acc):
    """One block of online softmax, in powers of two.

    q [R, D], k [D, BLOCK], v [BLOCK, D], visible broadcasts to [R, BLOCK]; highest, total [R] and acc [R, D] are the
    largest score so far, the sum of weights and the weighted sum of values, both relative to it.
    """
    scores = tl.dot(q, k, input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    shrink = tl.exp2(highest - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _decode_kernel(
    q_ptr,
    q_row,
    q_head,
    keys_ptr,
    k_page,
    k_place,
    k_head,
    values_ptr,
    v_page,
    v_place,
    v_head,
    tables_ptr,
    table_row,
    lengths_ptr,
    out_ptr,
    weights_ptr,
    scale,
    splits,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SHORTEST: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out = softmax(scale q k^T) v over one span of one sequence's context, for the query heads of one group.

    If SPLIT: out is [B, Hq, splits, D] float32 and weights [B, Hq, splits] log2 of each span's sum of exp2(scores);
    spans beyond the context write nothing. Otherwise out is [B, Hq, D], zeros where there is no context.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + sequence)
    span = _span(length, splits, BLOCK, SHORTEST)
    first = split * span
    end = tl.minimum(first + span, length)

    members = tl.arange(0, GROUP_PADDED)
    heads = kv_head * GROUP + members
    columns = tl.arange(0, DIM_PADDED)
    of_group = (members < GROUP)[:, None] & (columns < DIM)[None, :]
    q = tl.load(q_ptr + sequence * q_row + heads[:, None] * q_head + columns[None, :], mask=of_group, other=0.0)

    highest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    acc = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    table_ptr = tables_ptr + sequence * table_row
    k_ptr = keys_ptr + kv_head * k_head
    v_ptr = values_ptr + kv_head * v_head
    for start in range(first, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < end
        k_at = _places(table_ptr, tokens, inside, k_page, k_place, PAGE)
        v_at = _places(table_ptr, tokens, inside, v_page, v_place, PAGE)
        k = tl.load(
            k_ptr + k_at[None, :] + columns[:, None], mask=inside[None, :] & (columns < DIM)[:, None], other=0.0
        )
        v = tl.load(
            v_ptr + v_at[:, None] + columns[None, :], mask=inside[:, None] & (columns < DIM)[None, :], other=0.0
        )
        highest, total, acc = _attend(q, k, v, inside[None, :], scale, highest, total, acc)

    total = tl.where(total == 0.0, 1.0, total)
    attended = acc / total[:, None]
    all_heads = tl.num_programs(1) * GROUP
    at = sequence * all_heads + heads
    if SPLIT:
        at = at * splits + split
        some = members < tl.where(first < end, GROUP, 0)
        tl.store(
            out_ptr + at[:, None] * DIM + columns[None, :], attended, mask=some[:, None] & (columns < DIM)[None, :]
        )
        tl.store(weights_ptr + at, highest + tl.log2(total), mask=some)
    else:
        tl.store(out_ptr + at[:, None] * DIM + columns[None, :], attended.to(out_ptr.dtype.element_ty), mask=of_group)


@triton.jit
def _merge_kernel(
    partial_ptr,
    weights_ptr,
    lengths_ptr,
    out_ptr,
    splits,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SHORTEST: tl.constexpr,
):
    """out = sum_i 2^weights_i partial_i / sum_i 2^weights_i for one query head; zeros where there is no context."""
    sequence = tl.program_id(0).to(tl.int64)
    row = sequence * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths_ptr + sequence)
    numbers = tl.arange(0, SPLITS_PADDED)
    written = numbers < tl.cdiv(length, _span(length, splits, BLOCK, SHORTEST))
    columns = tl.arange(0, DIM_PADDED)
    weights = tl.load(weights_ptr + row * splits + numbers, mask=written, other=float("-inf"))
    shares = tl.exp2(weights - tl.maximum(tl.max(weights, axis=0), -1e30))  # not -inf - -inf where nothing is written
    total = tl.sum(shares, axis=0)
    partial = tl.load(
        partial_ptr + (row * splits + numbers)[:, None] * DIM + columns[None, :],
        mask=written[:, None] & (columns < DIM)[None, :],
        other=0.0,
    )
    merged = tl.sum(shares[:, None] * partial, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * DIM + columns, merged.to(out_ptr.dtype.element_ty), mask=columns < DIM)


@triton.jit
def _prefill_kernel(
    q_ptr,
    q_row,
    q_head,
    keys_ptr,
    k_page,
    k_place,
    k_head,
    values_ptr,
    v_page,
    v_place,
    v_head,
    tables_ptr,
    table_row,
    starts_ptr,
    lengths_ptr,
    out_ptr,
    scale,
    sequences,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    SEQUENCES_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = softmax(scale q k^T + causal) v for QUERIES new tokens of one sequence and the heads of one group.

    Row r of a program is query r // GROUP and head r % GROUP, so that no row but the last few is padding.
    """
    block = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    numbers = tl.arange(0, SEQUENCES_PADDED)
    known = numbers < sequences
    firsts = tl.load(starts_ptr + numbers, mask=known, other=0) // QUERIES + numbers
    sequence = tl.sum((known & (firsts <= block)).to(tl.int32), axis=0) - 1

    begin = tl.load(starts_ptr + sequence)
    new = tl.load(starts_ptr + sequence + 1) - begin
    length = tl.load(lengths_ptr + sequence)
    first = (block - (begin // QUERIES + sequence)) * QUERIES  # of the sequence's queries
    # A block too many has first >= new, and a sequence without context nothing to see: both end before they begin.
    end = tl.where(first < new, tl.minimum(length - new + first + QUERIES, length), 0)

    rows = tl.arange(0, ROWS)
    queries = first + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    valid = (rows < QUERIES * GROUP) & (queries < new)
    columns = tl.arange(0, DIM_PADDED)
    stored = valid[:, None] & (columns < DIM)[None, :]
    tokens_of_q = (begin + queries).to(tl.int64)
    q = tl.load(q_ptr + (tokens_of_q * q_row + heads * q_head)[:, None] + columns[None, :], mask=stored, other=0.0)
    positions = length - new + queries

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_row
    k_ptr = keys_ptr + kv_head * k_head
    v_ptr = values_ptr + kv_head * v_head
    for start in range(0, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < end
        k_at = _places(table_ptr, tokens, inside, k_page, k_place, PAGE)
        v_at = _places(table_ptr, tokens, inside, v_page, v_place, PAGE)
        k = tl.load(
            k_ptr + k_at[None, :] + columns[:, None], mask=inside[None, :] & (columns < DIM)[:, None], other=0.0
        )
        v = tl.load(
            v_ptr + v_at[:, None] + columns[None, :], mask=inside[:, None] & (columns < DIM)[None, :], other=0.0
        )
        visible = inside[None, :] & (tokens[None, :] <= positions[:, None])  # token 0 is to every row
        highest, total, acc = _attend(q, k, v, visible, scale, highest, total, acc)

    attended = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    all_heads = tl.num_programs(1) * GROUP
    at = (tokens_of_q * all_heads + heads) * DIM
    tl.store(out_ptr + at[:, None] + columns[None, :], attended.to(out_ptr.dtype.element_ty), mask=stored)
