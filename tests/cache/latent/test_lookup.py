from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from cache.latent.keys import Header, KeySpace
from cache.latent.lookup import LatentCache
from cache.latent.policy import nirvana
from cache.latent.store import Latent, MemoryStore, StoreError

WIDTH = 16
LEVELS = {5: 0.1, 10: 0.2, 15: 0.3, 20: 0.4, 25: 0.5}
ROWS = [0.02, 0.08, 0.18, 0.28, 0.38, 0.48, 0.8]
POLICY = nirvana(LEVELS)
SPACE = KeySpace("alice", "shapes@1", "linear", (), (4, 8, 8), 7.5, "")


def unit(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    vector = np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)
    return vector / np.linalg.norm(vector)


def at(similarity: float, seed: int = 0, axis: int = 1) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A unit vector of this inner product with unit(seed)."""
    base = unit(seed)
    other = unit(seed + 1000 + axis)
    other -= (other @ base) * base
    other /= np.linalg.norm(other)
    return (similarity * base + (1 - similarity**2) ** 0.5 * other).astype(np.float32)


def latents(value: float, alphas: Sequence[float] = tuple(LEVELS.values())) -> dict[float, Latent]:
    return {alpha: np.full(SPACE.shape, value + alpha, np.float16) for alpha in alphas}


class BrokenStore(MemoryStore):
    """Fails while `broken`; waits while `gate` is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False
        self.gate = threading.Event()
        self.gate.set()

    def _check(self) -> None:
        self.gate.wait()
        if self.broken:
            raise StoreError("connection gone")

    def put(self, header: Header, latents: Sequence[Latent]) -> Header:
        self._check()
        return super().put(header, latents)

    def get(self, id: int, level: float) -> Latent | None:
        self._check()
        return super().get(id, level)

    def remove(self, id: int, level: float | None = None) -> None:
        self._check()
        super().remove(id, level)

    def headers(self) -> Iterator[Header]:
        self._check()
        return super().headers()


Open = Callable[..., LatentCache]


@pytest.fixture
def open_cache() -> Iterator[Open]:
    caches: list[LatentCache] = []

    def build(store: Any = None, budget: int = 10**8, **options: Any) -> LatentCache:
        caches.append(LatentCache(store or MemoryStore(), budget, POLICY, seed=1, **options))
        return caches[-1]

    yield build
    for cache in caches:
        cache.close(1.0)


def put(cache: LatentCache, prompt: str, embedding: Any, value: float = 0.0, space: KeySpace = SPACE) -> None:
    assert cache.insert(space, prompt, embedding, latents(value))
    assert cache.flush(5.0)


def test_the_policy_says_how_deep(open_cache: Open) -> None:
    cache = open_cache()
    put(cache, "a red circle", unit(0), value=2.0)
    for similarity, alpha in [(0.97, 0.5), (0.92, 0.4), (0.87, 0.3), (0.77, 0.2), (0.67, 0.1)]:
        (found,) = cache.find(SPACE, at(similarity), "solver", ROWS, 1, 0)
        assert found is not None
        assert found.alpha == alpha
        assert found.similarity == pytest.approx(similarity, abs=1e-5)
        assert (found.latent == np.float16(2.0 + alpha)).all()
    assert cache.find(SPACE, at(0.6), "solver", ROWS, 1, 0) == [None]
    assert cache.find(SPACE, at(0.97), "lcm", ROWS, 1, 0) == [None]
