"""What is counted about the cache, for each tenant on its own."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Stats:
    """A tenant's figures at one moment; counts are since the start.

    counts: pictures by lookup result ("hit", "miss", "skipped" by the predictor, "error"); "rows_skipped", the
        network steps that hits saved; entries "stored" and "dropped" before they were; levels "evicted" for room,
        "expired", and "lost" (in the index, not in the store).
    hits_by_steps: pictures that started with about so many of 50 steps behind them.
    """

    entries: int
    bytes: int
    counts: dict[str, int]
    hits_by_steps: dict[int, int]

    @classmethod
    def total(cls, all: Iterable[Stats]) -> Stats:
        entries, size = 0, 0
        counts: Counter[str] = Counter()
        hits_by_steps: Counter[int] = Counter()
        for stats in all:
            entries += stats.entries
            size += stats.bytes
            counts.update(stats.counts)
            hits_by_steps.update(stats.hits_by_steps)
        return cls(entries, size, dict(counts), dict(sorted(hits_by_steps.items())))


COUNTS = ("hit", "miss", "skipped", "error", "rows_skipped", "stored", "dropped", "evicted", "expired", "lost")


@dataclass(slots=True)
class Figures:
    """Counters that any thread may raise."""

    _counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    _hits_by_steps: Counter[int] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def hit(self, steps: int, rows: int) -> None:
        """One picture that starts at `steps` of 50, and so skips `rows` rows of its plan."""
        with self._lock:
            self._counts["hit"] += 1
            self._counts["rows_skipped"] += rows
            self._hits_by_steps[steps] += 1

    def stats(self, entries: int, size: int) -> Stats:
        with self._lock:
            return Stats(entries, size, dict(self._counts), dict(sorted(self._hits_by_steps.items())))
