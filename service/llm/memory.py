"""The tensors under a KV space: makes a batch's moves, and says where its tokens are written and how they attend.

The space (`service/llm/spaces.py`) decides which pages and slots; here they become addresses of tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from accel.attention.batch import Attend, ContiguousAttend, PagedAttend
from accel.memory.paged_kv import HostPages, PagedKV
from accel.memory.virtual_kv import VirtualKV
from service.llm.scheduler import Batch, Chunk


class KvMemory(Protocol):
    """Keys and values of sequences, as the runner sees them. An address is what finds a sequence's: a row of integers.

    B sequences of a batch, T tokens.
    """

    address_shape: tuple[int, ...]  # of one sequence's address, at its longest

    def prepare(self, batch: Batch) -> None:
        """Make the batch's moves, in their order, and the places that it writes to writable."""
        ...

    def addresses(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """[B, ...] int32, no wider than these chunks need."""
        ...

    def places(self, addresses: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[T] int64: where keys and values of token i go, which stands at positions[i] of sequence rows[i]."""
        ...

    def attend(
        self, addresses: torch.Tensor, places: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, decodes: int
    ) -> Attend:
        """What a batch's layers attend with. Shapes as in `accel.attention.batch`."""
        ...


class PagedMemory:
    """Pages anywhere in one pool; a sequence's address is its row of the page table."""

    def __init__(self, kv: PagedKV, host: HostPages | None, max_length: int, scale: float) -> None:
        self._kv = kv
        self._host = host
        self._scale = scale
        self._page_size = kv.page_size
        self.address_shape: tuple[int, ...] = (-(-max_length // kv.page_size),)

    def prepare(self, batch: Batch) -> None:
        moves = batch.moves
        if moves.swap_outs or moves.swap_ins:
            assert self._host is not None  # a space without host places swaps nothing
            if moves.swap_outs:
                self._host.swap_out([page for page, _ in moves.swap_outs], [place for _, place in moves.swap_outs])
            if moves.swap_ins:
                self._host.swap_in([place for place, _ in moves.swap_ins], [page for _, page in moves.swap_ins])
        if moves.copies:
            self._kv.copy(moves.copies)

    def addresses(self, chunks: Sequence[Chunk]) -> np.ndarray:
        pages = [chunk.sequence.pages for chunk in chunks]
        counts = np.array([len(row) for row in pages])
        tables = np.zeros((len(pages), counts.max()), np.int32)
        filled = np.arange(tables.shape[1]) < counts[:, None]
        tables[filled] = np.fromiter(itertools.chain.from_iterable(pages), np.int32, counts.sum())
        return tables

    def places(self, addresses: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        page, offset = np.divmod(positions, self._page_size)
        places: np.ndarray = addresses[rows, page].astype(np.int64) * self._page_size + offset
        return places

    def attend(
        self, addresses: torch.Tensor, places: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, decodes: int
    ) -> Attend:
        return PagedAttend(self._kv, addresses, places, starts, lengths, decodes, self._scale)


class VirtualMemory:
    """Each sequence contiguous in virtual memory; its address is the number of its slot."""

    address_shape: tuple[int, ...] = ()

    def __init__(self, kv: VirtualKV, scale: float) -> None:
        self._kv = kv
        self._scale = scale

    def prepare(self, batch: Batch) -> None:
        for slot in batch.moves.frees:
            self._kv.free(slot)
        for chunk in batch.chunks:
            self._kv.grow(chunk.sequence.slot, chunk.start + chunk.count)
        for chunk in batch.chunks:  # mapped behind this batch's back, so that the next one need not wait
            self._kv.prefetch(chunk.sequence.slot, chunk.start + chunk.count + 1)

    def addresses(self, chunks: Sequence[Chunk]) -> np.ndarray:
        return np.array([chunk.sequence.slot for chunk in chunks], np.int32)

    def places(self, addresses: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        places: np.ndarray = addresses[rows].astype(np.int64) * self._kv.rows + positions
        return places

    def attend(
        self, addresses: torch.Tensor, places: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, decodes: int
    ) -> Attend:
        return ContiguousAttend(self._kv, addresses, places, starts, lengths, decodes, self._scale)
