"""Where latents are kept: what every store does, and one in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cache.latent.codec import DamagedRecordError, decode_latent, encode_latent
from cache.latent.keys import Header

Latent = NDArray[np.float16]  # [C, h, w]


class StoreError(Exception):
    """The store cannot do this now: disk full, read-only or in use, connection gone. One line; the next call may work.

    StoreError
    └── StoreFullError    the budget is used up: evict, then put again
    """


class StoreFullError(StoreError):
    pass


class Store(Protocol):
    """Entries of a header and one latent a level. Every call may raise StoreError, and heals when its cause is gone."""

    damaged: int  # records that were found damaged, and removed, since the store was opened

    @property
    def used_bytes(self) -> int:
        """What the store takes now, headers included: what a budget is held against."""

    def put(self, header: Header, latents: Sequence[Latent]) -> Header:
        """Keeps one latent for each of `header.levels`, all of them or none, in place of an entry with the same id.

        Returns the header with `sizes` filled in: the bytes of each level and its share of the header's.
        """

    def get(self, id: int, level: float) -> Latent | None:
        """None: gone, or damaged."""

    def remove(self, id: int, level: float | None = None) -> None:
        """Removes a level, the entry with its last level, or the whole entry (None); what is gone, gladly."""

    def headers(self) -> Iterator[Header]:
        """Every entry, with the levels that are left of it; damaged ones are counted, removed and passed over."""

    def count(self) -> int:
        """About how many headers there are."""

    def close(self) -> None: ...


class Change(NamedTuple):
    """Something that another server did to a store that several share."""

    id: int
    level: float | None  # removed; None: all of it
    header: Header | None  # put; None: removed


class Changes(NamedTuple):
    cursor: str  # what to ask from next time
    events: tuple[Change, ...]  # in the order in which they happened
    complete: bool  # False: more has happened than the log remembers; build anew from `headers`


class SharedStore(Store, Protocol):
    """A store that several servers use at the same time.

    To follow the others: take the cursor of `changes(None)`, read `headers`, then ask for the changes after the cursor
    again and again. Whatever happened while the headers were read comes once more as a change.
    """

    def changes(self, after: str | None) -> Changes:
        """What other servers have put and removed since the cursor `after`; None: nothing, but the cursor of now."""


def records_of(header: Header, latents: Sequence[Latent]) -> dict[float, bytes]:
    """The encoded latents by level. Raises ValueError for latents that the header does not describe."""
    if not header.levels or len(header.levels) != len(latents) or len(set(header.levels)) != len(header.levels):
        raise ValueError(f"{len(latents)} latents for the levels {header.levels}")
    return {
        level: encode_latent(header.id, level, latent) for level, latent in zip(header.levels, latents, strict=True)
    }


def with_sizes(header: Header, level_bytes: Sequence[int], header_bytes: int) -> Header:
    """`header` with its own bytes spread over its levels, so that the sizes add up to the entry's bytes."""
    share, rest = divmod(header_bytes, len(level_bytes))
    return replace(header, sizes=tuple(size + share + (i < rest) for i, size in enumerate(level_bytes)))


def without_level(header: Header, level: float) -> Header | None:
    """What is left of an entry, or None. Sizes are those of `put`: they do not grow when a level goes."""
    left = [(alpha, size) for alpha, size in zip(header.levels, header.sizes, strict=True) if alpha != level]
    return replace(header, levels=tuple(a for a, _ in left), sizes=tuple(s for _, s in left)) if left else None


class MemoryStore:
    """A store that ends with the process, for tests and trials. Its bytes are those of the latents' records."""

    def __init__(self) -> None:
        self.damaged = 0
        self._headers: dict[int, Header] = {}
        self._records: dict[tuple[int, float], bytes] = {}
        self._lock = threading.RLock()

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(map(len, self._records.values()))

    def put(self, header: Header, latents: Sequence[Latent]) -> Header:
        records = records_of(header, latents)
        header = with_sizes(header, [len(record) for record in records.values()], 0)
        with self._lock:
            self.remove(header.id)
            self._headers[header.id] = header
            self._records |= {(header.id, level): record for level, record in records.items()}
        return header

    def get(self, id: int, level: float) -> Latent | None:
        record = self._records.get((id, level))
        if record is None:
            return None
        try:
            return decode_latent(record, id, level)
        except DamagedRecordError:
            with self._lock:
                self.damaged += 1
                self.remove(id, level)
            return None

    def remove(self, id: int, level: float | None = None) -> None:
        with self._lock:
            header = self._headers.pop(id, None)
            if header is None:
                return
            left = None if level is None else without_level(header, level)
            for alpha in header.levels:
                if left is None or alpha not in left.levels:
                    self._records.pop((id, alpha), None)
            if left is not None:
                self._headers[id] = left

    def headers(self) -> Iterator[Header]:
        with self._lock:
            found = list(self._headers.values())
        yield from found

    def count(self) -> int:
        return len(self._headers)

    def close(self) -> None:
        pass
