"""A batch of tokens as a decoder sees it: what to embed, and a way to attend that knows where keys and values lie.

Tokens of several sequences are flattened into one row after another (selective batching, Orca): only attention tells
the sequences apart. Shapes: T tokens, B sequences, R wanted rows, M pages of a table's row, Hq query and Hkv key-value
heads of D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from accel.attention.contiguous import contiguous_decode, contiguous_prefill, rows_in_slots
from accel.attention.paged import paged_decode, paged_prefill, rows_in_pages
from accel.attention.reference import (
    DecodeGroup,
    PrefillPart,
    RowsOf,
    decode_plan,
    prefill_plan,
    run_decode,
    run_prefill,
)
from accel.kernels.choice import use_triton
from accel.kernels.kv_write import kv_write, rows_of


class Attend(Protocol):
    """Attention of one layer over a batch."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Cache k and v [T, Hkv, D], then attend with q [T, Hq, D]; returns [T, Hq, D].

        Layers come in ascending order; one that does not begins another forward pass.
        """
        ...


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What a decoder reads in one forward pass."""

    tokens: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, each token's in its own sequence
    last: torch.Tensor  # [R] int64, rows whose logits are wanted
    attend: Attend


class PageMemory(Protocol):
    """Keys and values in pages, as accel.memory.paged_kv.PagedKV."""

    @property
    def keys(self) -> list[torch.Tensor]:
        """[N, S, Hkv, D] for each layer."""
        ...

    @property
    def values(self) -> list[torch.Tensor]: ...


class SlotMemory(Protocol):
    """Keys and values in a row a sequence, as accel.memory.virtual_kv.VirtualKV."""

    def keys(self, layer: int) -> torch.Tensor:
        """[slots, Lmax, Hkv, D]."""
        ...

    def values(self, layer: int) -> torch.Tensor: ...


class PagedAttend:
    """Attention over pages. The first `decodes` sequences have one query each; the others a run of their last tokens.

    The tensors may be buffers that a captured graph reads again with other contents. A padded row has length 0 and a
    write slot of -1; it is attended to zeros.

    Args:
        tables: [B, M] int32, pages of each sequence.
        slots: [T] int64, where each token's key and value go: page * S + place in the page; negative: nowhere.
        starts: [B + 1] int32; the queries of sequence b are rows starts[b] to starts[b + 1]. Not read where all
            sequences are decodes.
        lengths: [B] int32, tokens of context, the new ones included.
        scale: factor of the scores.
    """

    def __init__(
        self,
        kv: PageMemory,
        tables: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        decodes: int,
        scale: float,
    ) -> None:
        self._kv, self._tables, self._slots, self._scale = kv, tables, slots, scale
        self._split = _Split(starts, lengths, decodes)
        self._plans = _Plans(self._split)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As Attend."""
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        kv_write(k, v, keys, values, self._slots)
        if not use_triton(q):
            return self._plans.run(layer, q, keys, values, rows_in_pages(self._tables, keys.shape[1]), self._scale)
        split, n = self._split, self._split.decodes
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if n:
            paged_decode(q[:n], keys, values, self._tables[:n], split.decode_lengths, self._scale, out[:n])
        if split.prefills:
            tables = self._tables[n:]
            paged_prefill(q[n:], keys, values, tables, split.starts, split.lengths, self._scale, out[n:])
        return out


class ContiguousAttend:
    """Attention over slots that are contiguous for each sequence; the rest as PagedAttend.

    Args:
        rows: [B] int32 or int64, the slot of each sequence.
        slots: [T] int64, where each token's key and value go: slot * Lmax + position; negative: nowhere.
    """

    def __init__(
        self,
        kv: SlotMemory,
        rows: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        decodes: int,
        scale: float,
    ) -> None:
        self._kv, self._rows, self._slots, self._scale = kv, rows, slots, scale
        self._split = _Split(starts, lengths, decodes)
        self._plans = _Plans(self._split)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As Attend."""
        keys, values = self._kv.keys(layer), self._kv.values(layer)
        kv_write(k, v, keys, values, self._slots)
        if not use_triton(q):
            return self._plans.run(layer, q, keys, values, rows_in_slots(self._rows, keys.shape[1]), self._scale)
        split, n = self._split, self._split.decodes
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if n:
            contiguous_decode(q[:n], keys, values, self._rows[:n], split.decode_lengths, self._scale, out[:n])
        if split.prefills:
            rows = self._rows[n:]
            contiguous_prefill(q[n:], keys, values, rows, split.starts, split.lengths, self._scale, out[n:])
        return out


class _Split:
    """Lengths and starts of the decodes, and of the prefills after them."""

    def __init__(self, starts: torch.Tensor, lengths: torch.Tensor, decodes: int) -> None:
        if not 0 <= decodes <= len(lengths):
            raise ValueError(f"decodes: {decodes}; allowed: 0 to the number of sequences, {len(lengths)}")
        self.decodes = decodes
        self.prefills = len(lengths) - decodes
        self.decode_lengths = lengths[:decodes]
        self.lengths = lengths[decodes:]
        self.starts = starts[decodes:] - decodes if self.prefills else starts  # of the rows after those of the decodes


class _Plans:
    """What the reference reads of a cache, worked out at the first layer of a forward pass."""

    def __init__(self, split: _Split) -> None:
        self._split = split
        self._layer: int | None = None
        self._decode: list[DecodeGroup] = []
        self._prefill: list[PrefillPart] = []

    def run(
        self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: RowsOf, scale: float
    ) -> torch.Tensor:
        split, n = self._split, self._split.decodes
        if self._layer is None or layer <= self._layer:
            self._decode = decode_plan(rows, split.decode_lengths, q.dtype)
            self._prefill = prefill_plan(_after(rows, n), split.starts, split.lengths, q.dtype)
        self._layer = layer
        keys, values = rows_of(keys), rows_of(values)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if n:
            run_decode(q[:n], keys, values, self._decode, scale, out[:n])
        if len(q) > n:
            run_prefill(q[n:], keys, values, self._prefill, scale, out[n:])
        return out


def _after(rows: RowsOf, decodes: int) -> RowsOf:
    """The rows of the sequences after the decodes, counted from 0."""
    return lambda sequences, positions: rows(sequences + decodes, positions)
