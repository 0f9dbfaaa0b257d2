"""Attention in plain torch, on any device; on the CPU it is what serves.

A plan says which rows of the cache each sequence reads. It is the same for every layer of a forward pass, so it is made
once and run for each. Where the rows of a sequence follow each other in memory they are read in place; otherwise they
are gathered first, several short sequences at a time, so that a large batch takes few calls.

Shapes: T new tokens, B sequences, L tokens of context, Hq query and Hkv key-value heads of D dimensions, G = Hq / Hkv.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Sequences [b] and their positions [b, n] to rows of the flattened cache [b, n], all int64.
RowsOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Found by measuring SmolLM2's shape on the CPU (bench/paged.py): padding of this many tokens costs as much as another
# call, and what is gathered at a time should stay in the processor's cache.
_PADDING_OF_A_GROUP = 256
_TOKENS_OF_A_GROUP = 2048


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences that one call attends to, padded to the longest."""

    sequences: torch.Tensor | None  # [b] int64; None: all of them in order
    rows: torch.Tensor | slice  # [b * longest] int64, or where those of a single sequence lie in the cache
    longest: int
    mask: torch.Tensor | None  # [b, 1, 1, longest], added to the scores; None: all are of that length


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """The new tokens of one sequence, the last of its context."""

    queries: slice  # of q
    rows: torch.Tensor | slice  # [L] int64, or where they lie in the cache
    mask: torch.Tensor | None  # [n, L], added to the scores; None: causal if there is no prefix, else a single query
    causal: bool


def decode_plan(rows_of: RowsOf, lengths: torch.Tensor, dtype: torch.dtype) -> list[DecodeGroup]:
    """Groups of similar lengths, so that little is padded. A sequence of length 0 is in no group.

    Padding repeats a row of the sequence's own: what lies beyond its end may be anything, even NaN.
    """
    device = lengths.device
    counts = lengths.tolist()
    groups = []
    for members in _groups(counts):
        longest = counts[members[0]]
        everyone = len(members) == len(counts)
        sequences = torch.tensor(sorted(members), device=device)
        of_members = lengths[sequences].long().unsqueeze(1)
        positions = torch.arange(longest, device=device)
        rows = rows_of(sequences, torch.minimum(positions, of_members - 1)).flatten()
        mask = None
        if counts[members[-1]] < longest:
            mask = torch.zeros(len(members), 1, 1, longest, dtype=dtype, device=device)
            mask.masked_fill_((positions >= of_members)[:, None, None], float("-inf"))
        in_place = _run(rows) if len(members) == 1 else None
        groups.append(DecodeGroup(None if everyone else sequences, in_place or rows, longest, mask))
    return groups


def _groups(lengths: list[int]) -> Iterator[list[int]]:
    """Indices of lengths > 0, longest first."""
    group: list[int] = []
    padding = 0
    for i in sorted((i for i, length in enumerate(lengths) if length > 0), key=lambda i: -lengths[i]):
        if group:
            longest = lengths[group[0]]
            padding += longest - lengths[i]
            if padding > _PADDING_OF_A_GROUP or longest * (len(group) + 1) > _TOKENS_OF_A_GROUP:
                yield group
                group, padding = [], 0
        group.append(i)
    if group:
        yield group


def prefill_plan(rows_of: RowsOf, starts: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype) -> list[PrefillPart]:
    """One part a sequence that has queries."""
    device = lengths.device
    bounds, counts = starts.tolist(), lengths.tolist()
    parts = []
    for i, length in enumerate(counts):
        queries = slice(bounds[i], bounds[i + 1])
        new = queries.stop - queries.start
        if new <= 0 or length <= 0:
            continue
        positions = torch.arange(length, device=device)
        rows = rows_of(torch.tensor([i], device=device), positions[None]).flatten()
        mask = None
        if 1 < new < length:
            ahead = positions > positions[length - new :, None]
            mask = torch.zeros(new, length, dtype=dtype, device=device).masked_fill_(ahead, float("-inf"))
        parts.append(PrefillPart(queries, _run(rows) or rows, mask, causal=1 < new == length))
    return parts


def _run(rows: torch.Tensor) -> slice | None:
    """[L] rows as a slice if they follow each other. On the CPU only: elsewhere asking would mean waiting."""
    if rows.device.type != "cpu":
        return None
    first, count = int(rows[0]), len(rows)
    if int(rows[-1]) - first != count - 1 or not bool((rows.diff() == 1).all()):
        return None
    return slice(first, first + count)


def run_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: list[DecodeGroup],
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, Hq, D] from q of that shape and flattened keys and values [rows, Hkv, D]; zeros for those in no group."""
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not plan or plan[0].sequences is not None:
        out.zero_()
    heads = keys.shape[1]
    grouped = q.unflatten(1, (heads, -1))  # [B, Hkv, G, D]: the queries of a group, in place of several positions
    for group in plan:
        chosen = grouped if group.sequences is None else grouped[group.sequences]
        k, v = (
            rows.view(len(chosen), group.longest, *rows.shape[1:]).transpose(1, 2)
            for rows in _take(keys, values, group.rows)
        )
        attended = F.scaled_dot_product_attention(chosen, k, v, attn_mask=group.mask, scale=scale).flatten(1, 2)
        if group.sequences is None:
            out.copy_(attended)
        else:
            out[group.sequences] = attended
    return out


def run_prefill(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: list[PrefillPart],
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, Hq, D] from q of that shape and flattened keys and values [rows, Hkv, D]; zeros for rows in no part."""
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if sum(part.queries.stop - part.queries.start for part in plan) < len(q):
        out.zero_()
    heads = keys.shape[1]
    grouped = q.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, T, D]
    for part in plan:
        # [Hkv, G, L, D] without a copy: the queries of a group read the same keys.
        k, v = (
            rows.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)
            for rows in _take(keys, values, part.rows)
        )
        attended = F.scaled_dot_product_attention(
            grouped[:, :, part.queries], k, v, attn_mask=part.mask, is_causal=part.causal, scale=scale
        )
        out[part.queries].unflatten(1, (heads, -1)).copy_(attended.permute(2, 0, 1, 3))
    return out


def _take(keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of both, [n, Hkv, D]. Gathered ones lie in memory that the thread's next call overwrites."""
    if isinstance(rows, slice):
        return keys[rows], values[rows]
    if keys.device.type != "cpu":
        return keys[rows], values[rows]
    to = _scratch.take(2, len(rows), keys)
    return torch.index_select(keys, 0, rows, out=to[0]), torch.index_select(values, 0, rows, out=to[1])


class _Scratch(threading.local):
    """Memory that stays: fresh memory for every gather costs more in page faults than the copy itself."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, copies: int, rows: int, like: torch.Tensor) -> torch.Tensor:
        """[copies, rows, *like.shape[1:]] of like's dtype, with anything in it."""
        shape = (copies, rows, *like.shape[1:])
        size = torch.Size(shape).numel() * like.dtype.itemsize
        if self._bytes.numel() < size:
            with torch.inference_mode(False):  # else it could not be written to outside of that mode
                self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(like.dtype).view(shape)


_scratch = _Scratch()
