"""Which items leave when the byte budget is full: LCBFU, LRU, LFU and FIFO behind one interface.

Every policy gives an item a score and the least score leaves first; among equal scores the item added first does.
Scores live in a heap whose outdated entries are skipped when they surface, so every operation is O(log n) (amortised),
and an order of heap entries is settled by (score, serial number) before items could be compared.

Not thread-safe: the caller holds its own lock.
"""

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


@dataclass(slots=True)
class _Entry:
    serial: int  # order of addition, unique
    size: int  # bytes
    value: float
    used: int  # clock at the last addition or hit
    hits: int = 0
    score: float = 0.0


class Evictor(ABC, Generic[Item]):
    """Items with their sizes in bytes, and the order in which they leave."""

    def __init__(self) -> None:
        self._entries: dict[Item, _Entry] = {}
        self._heap: list[tuple[float, int, Item]] = []
        self._clock = 0
        self._total = 0

    @abstractmethod
    def _score(self, entry: _Entry) -> float:
        """The item with the least score leaves first."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: Item) -> bool:
        return item in self._entries

    @property
    def total_bytes(self) -> int:
        """The sizes of all items together."""
        return self._total

    def add(self, item: Item, size: int, value: float = 0.0) -> None:
        """Take in `item` of `size` bytes, unused so far; one that is there already is replaced by it.

        `value` is what one hit on the item saves; only LCBFU looks at it.
        """
        if size < 0:
            raise ValueError(f"size is {size}, expected at least 0 bytes")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"value is {value}, expected a finite number of at least 0")
        self.remove(item)
        self._clock += 1
        entry = _Entry(self._clock, size, value, self._clock)
        self._entries[item] = entry
        self._total += size
        entry.score = self._score(entry)
        self._push(item, entry)

    def hit(self, item: Item) -> bool:
        """Count one use of `item`; False if it is not here."""
        entry = self._entries.get(item)
        if entry is None:
            return False
        self._clock += 1
        entry.used = self._clock
        entry.hits += 1
        score = self._score(entry)
        if score != entry.score:
            entry.score = score
            self._push(item, entry)
        return True

    def remove(self, item: Item) -> bool:
        """Forget `item`; False if it is not here."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        self._total -= entry.size
        return True

    def victims(self, needed: int) -> list[Item]:
        """Forget and return the items that leave, first one first: as few as free `needed` bytes, or all there are."""
        found: list[Item] = []
        freed = 0
        while freed < needed and self._entries:
            score, serial, item = heapq.heappop(self._heap)
            entry = self._entries.get(item)
            if entry is not None and (entry.score, entry.serial) == (score, serial):
                freed += entry.size
                self.remove(item)
                found.append(item)
        return found

    def _push(self, item: Item, entry: _Entry) -> None:
        heapq.heappush(self._heap, (entry.score, entry.serial, item))
        # Hits and removals leave outdated entries behind; half of the heap at most may be such.
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [(entry.score, entry.serial, item) for item, entry in self._entries.items()]
            heapq.heapify(self._heap)


class LCBFU(Evictor[Item]):
    """Least computationally beneficial and frequently used (NIRVANA): least f·K first.

    f counts the hits on the item, K is its `value`: the steps that a hit on its level saves.
    """

    def _score(self, entry: _Entry) -> float:
        return entry.hits * entry.value


class LRU(Evictor[Item]):
    """Least recently used first."""

    def _score(self, entry: _Entry) -> float:
        return entry.used


class LFU(Evictor[Item]):
    """Least frequently used first."""

    def _score(self, entry: _Entry) -> float:
        return entry.hits


class FIFO(Evictor[Item]):
    """First in, first out."""

    def _score(self, entry: _Entry) -> float:
        return entry.serial


EVICTORS: dict[str, type[Evictor[Hashable]]] = {"lcbfu": LCBFU, "lru": LRU, "lfu": LFU, "fifo": FIFO}
