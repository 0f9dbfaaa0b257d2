from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.latent import catalogue, lookup
from cache.latent.index import Index, _Segment
from cache.latent.keys import Header, KeySpace
from cache.latent.lookup import LatentCache
from cache.latent.policy import nirvana
from cache.latent.predictor import MatchPredictor
from cache.latent.store import Change, Changes, Latent, MemoryStore, StoreError

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


@pytest.mark.parametrize(
    ("rows", "alpha"),
    [
        ([0.02, 0.5], 0.5),  # the last row that is at least as noisy
        ([0.02, np.float32(0.5)], 0.5),
        ([0.02, 0.3, 0.55], 0.3),  # 0.3, 0.4 and 0.5 enter at row 1: the one that needs no re-noising
        ([0.02, 0.32, 0.55], 0.4),
        ([0.02, 0.6], None),  # only row 0 is noisy enough
        ([0.6, 0.9], None),
        ([], None),
    ],
)
def test_a_start_enters_the_plan_at_row_1_or_later(open_cache: Open, rows: list[float], alpha: float | None) -> None:
    cache = open_cache()
    put(cache, "a red circle", unit(0))
    (found,) = cache.find(SPACE, unit(0), "solver", rows, 1, 0)
    assert (None if found is None else found.alpha) == alpha


def test_a_hole_falls_to_the_next_smaller_level(open_cache: Open) -> None:
    cache = open_cache()
    cache.insert(SPACE, "a red circle", unit(0), latents(0.0, alphas=(0.1, 0.3, 0.5)))
    assert cache.flush(5.0)
    (found,) = cache.find(SPACE, at(0.92), "solver", ROWS, 1, 0)
    assert found is not None
    assert found.alpha == 0.3


@pytest.mark.parametrize(
    ("fresh", "similarity", "start"),
    [
        (0.0, 0.97, (0.5, 5)),
        (0.0, 0.92, (0.4, 4)),
        (0.1, 0.97, (0.5, 4)),  # 0.38 of row 4 leaves 42% of the variance to fresh noise
        (0.1, 0.92, (0.5, 4)),  # deeper than what may be entered at, for the noise
        (0.4, 0.92, (0.5, 4)),
        (0.5, 0.97, (0.4, 3)),
        (0.7, 0.97, (0.4, 2)),
        (0.99, 0.97, None),
    ],
)
def test_fresh_noise_is_bought_with_rows(
    open_cache: Open, fresh: float, similarity: float, start: tuple[float, int] | None
) -> None:
    cache = open_cache()
    cache.policy = dataclasses.replace(POLICY, fresh={"solver": fresh})
    put(cache, "a red circle", unit(0))
    (found,) = cache.find(SPACE, at(similarity), "solver", ROWS, 1, 0)
    assert (None if found is None else (found.alpha, found.row)) == start
    if found is not None:
        assert 1 - (ROWS[found.row] / found.alpha) ** 2 >= fresh


def test_more_rows_saved_come_before_more_similarity(open_cache: Open) -> None:
    cache = open_cache()
    cache.insert(SPACE, "shallow", unit(0), latents(0.0, alphas=(0.1,)))
    put(cache, "deep", at(0.96))
    (found,) = cache.find(SPACE, unit(0), "solver", ROWS, 1, 0)
    assert found is not None
    assert (found.alpha, found.similarity) == (0.5, pytest.approx(0.96, abs=1e-5))


def test_ten_pictures_start_from_as_many_entries_as_there_are(open_cache: Open) -> None:
    cache = open_cache()
    for i in range(4):
        put(cache, f"prompt {i}", at(0.97, axis=i))
    found = [start for start in cache.find(SPACE, unit(0), "solver", ROWS, 10, 0) if start]
    assert len(found) == 10
    assert len({start.id for start in found[:4]}) == 4


def test_chance_chooses_among_near_equal_entries_only(open_cache: Open) -> None:
    cache = open_cache()
    for i in range(4):
        put(cache, f"near {i}", at(0.985, axis=i))
    put(cache, "farther", at(0.96, axis=9))
    chosen = [cache.find(SPACE, unit(0), "solver", ROWS, 1, seed)[0] for seed in range(60)]
    similarities = {round(found.similarity, 3) for found in chosen if found}
    assert similarities == {0.985}
    assert len({found.id for found in chosen if found}) == 4


def test_a_seed_repeats_its_choice_in_one_cache_and_tells_nothing_of_another(open_cache: Open) -> None:
    store = MemoryStore()
    cache = open_cache(store)
    for i in range(8):
        put(cache, f"near {i}", at(0.985, axis=i))

    def ids(cache: LatentCache) -> list[int]:
        return [found.id for seed in range(12) if (found := cache.find(SPACE, unit(0), "solver", ROWS, 1, seed)[0])]

    secret = LatentCache(store, 10**8, POLICY)
    assert ids(cache) == ids(cache)
    assert ids(cache) != ids(secret)
    secret.close()


def test_the_same_prompt_replaces(open_cache: Open) -> None:
    store = MemoryStore()
    cache = open_cache(store)
    for value in (1.0, 2.0, 3.0):
        put(cache, "a red circle", unit(0), value=value)
    (found,) = cache.find(SPACE, unit(0), "solver", ROWS, 1, 0)
    assert found is not None
    assert (found.latent == np.float16(3.5)).all()
    assert cache.stats("alice").entries == 1
    assert len(list(store.headers())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "bob"},
        {"model": "shapes@2"},
        {"family": "cosine"},
        {"loras": (("ink", 1.0),)},
        {"guidance": 8.0},
        {"negative_prompt": "blurry"},
    ],
)
def test_nothing_is_found_in_another_key_space(open_cache: Open, change: dict[str, Any]) -> None:
    cache = open_cache()
    put(cache, "a red circle", unit(0))
    assert cache.find(dataclasses.replace(SPACE, **change), unit(0), "solver", ROWS, 1, 0) == [None]


def test_another_embedders_vectors_are_not_compared(open_cache: Open) -> None:
    cache = open_cache()
    put(cache, "a red circle", unit(0))
    wide = np.ones(2 * WIDTH, np.float32) / np.float32((2 * WIDTH) ** 0.5)
    assert cache.find(SPACE, wide, "solver", ROWS, 1, 0) == [None]
    put(cache, "a red circle", wide)
    assert cache.find(SPACE, wide, "solver", ROWS, 1, 0) != [None]


@pytest.mark.parametrize(
    "spoilt",
    [
        {0.1: np.full(SPACE.shape, np.nan, np.float16)},
        {0.1: np.full(SPACE.shape, np.inf, np.float16)},
        {0.1: np.zeros((4, 8, 9), np.float16)},
        {},
    ],
)
def test_latents_that_cannot_be_started_from_are_not_kept(open_cache: Open, spoilt: dict[float, Latent]) -> None:
    cache = open_cache()
    assert cache.insert(SPACE, "a red circle", unit(0), spoilt)
    assert cache.flush(5.0)
    assert cache.stats("alice").entries == 0
    assert cache.stats("alice").counts["dropped"] == 1


def test_the_budget_holds_and_what_is_used_stays(open_cache: Open) -> None:
    store = MemoryStore()
    budget = 20_000
    cache = open_cache(store, budget)
    put(cache, "used", unit(0))
    for i in range(1, 40):
        cache.find(SPACE, unit(0), "solver", ROWS, 1, i)
        put(cache, f"prompt {i}", unit(i))
        assert store.used_bytes <= budget
    assert store.used_bytes > 0.9 * budget
    (found,) = cache.find(SPACE, unit(0), "solver", ROWS, 1, 0)
    assert found is not None
    assert found.alpha == 0.5
    assert cache.stats("alice").counts["evicted"] > 50
    assert cache.stats("alice").bytes == store.used_bytes


def test_an_entry_without_levels_is_gone(open_cache: Open) -> None:
    store = MemoryStore()
    cache = open_cache(store, 2000)
    for i in range(5):
        put(cache, f"prompt {i}", unit(i))
    assert cache.stats("alice").entries == len(list(store.headers())) <= 2


def test_an_entry_larger_than_the_budget_is_dropped(open_cache: Open) -> None:
    cache = open_cache(None, 1000)
    put(cache, "a red circle", unit(0))
    assert cache.stats("alice").entries == 0
    assert cache.stats("alice").counts["dropped"] == 1


def test_a_tenants_entries_expire(open_cache: Open) -> None:
    now = [1000.0]
    store = MemoryStore()
    cache = open_cache(store, ttl_s={"alice": 60.0}, clock=lambda: now[0])
    bob = dataclasses.replace(SPACE, tenant="bob")
    put(cache, "a red circle", unit(0))
    put(cache, "a red circle", unit(0), space=bob)
    now[0] += 59
    assert cache.find(SPACE, unit(0), "solver", ROWS, 1, 0) != [None]
    now[0] += 2
    assert cache.find(SPACE, unit(0), "solver", ROWS, 1, 0) == [None]
    assert cache.find(bob, unit(0), "solver", ROWS, 1, 0) != [None]
    assert until(lambda: len(list(store.headers())) == 1)
    assert cache.stats("alice").counts["expired"] == 5


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_the_cache_survives_a_restart(open_cache: Open) -> None:
    store = MemoryStore()
    first = open_cache(store)
    for i in range(3):
        put(first, f"prompt {i}", unit(i), value=float(i))
    first.close()
    told: list[tuple[int, int]] = []
    second = open_cache(store, progress=lambda read, total: told.append((read, total)))
    (found,) = second.find(SPACE, unit(2), "solver", ROWS, 1, 0)
    assert found is not None
    assert (found.latent == np.float16(2.5)).all()
    assert told == [(3, 3)]
    assert second.stats("alice").bytes == store.used_bytes


@pytest.fixture
def small_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes get a graph from 100 entries on."""
    monkeypatch.setattr(catalogue, "Index", partial(Index, exact_limit=100))


def graph_of(cache: LatentCache) -> Index:
    held = cache._catalogue.space(SPACE, WIDTH)
    assert held is not None
    assert held.index.settle(30)
    assert not held.index.exact
    return held.index


@pytest.mark.usefixtures("small_graphs")
def test_large_indexes_are_saved_at_the_end_and_met_by_what_has_changed(
    open_cache: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bob = MemoryStore(), dataclasses.replace(SPACE, tenant="bob")
    first = open_cache(store, snapshots=tmp_path / "index", queue=1000)
    for i in range(150):
        assert first.insert(SPACE, f"prompt {i}", unit(i), latents(0.0, (0.5,)))
    put(first, "few", unit(0), space=bob)
    assert first.flush(30)
    graph_of(first)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "of another day").touch()
    assert first.close()
    assert [path.name for path in (tmp_path / "index").iterdir()] == [f"{SPACE.digest.hex()}-{WIDTH}"]

    # Without the cache's knowledge, as after a kill: some went, one came.
    prompts = {header.prompt: header.id for header in store.headers() if header.space == SPACE}
    for i in range(5):
        store.remove(prompts[f"prompt {i}"])
    fresh = Header(1, SPACE, "fresh", unit(999), time.time(), (0.5,), (0,))
    store.put(fresh, [np.full(SPACE.shape, 7.0, np.float16)])
    read: list[int] = []
    load = _Segment.load
    monkeypatch.setattr(_Segment, "load", lambda *a: (read.append(1), load(*a))[1])
    second = open_cache(store, snapshots=tmp_path / "index")
    assert sorted(graph_of(second).ids().tolist()) == sorted(
        header.id for header in store.headers() if header.space == SPACE
    )
    assert read == [1]
    assert second.find(SPACE, unit(999), "solver", ROWS, 1, 0)[0] is not None
    assert second.find(SPACE, unit(0), "solver", ROWS, 1, 0) == [None]
    assert second.find(SPACE, unit(5), "solver", ROWS, 1, 0)[0] is not None
    assert second.errors == 0
    assert second.purge("alice") == 146
    assert not list((tmp_path / "index").iterdir())  # what is purged is purged there too


@pytest.mark.usefixtures("small_graphs")
def test_a_damaged_or_unwritable_graph_is_counted_and_costs_nothing(
    open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore()
    first = open_cache(store, snapshots=tmp_path, queue=1000)
    for i in range(150):
        assert first.insert(SPACE, f"prompt {i}", unit(i), latents(0.0, (0.5,)))
    assert first.flush(30)
    graph_of(first)
    assert first.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    second = open_cache(store, snapshots=tmp_path)
    graph_of(second)
    assert second.errors == 1
    assert f"{path}: the snapshot is damaged" in caplog.text
    path.unlink()
    path.mkdir()  # nothing can be put in its place
    assert second.purge("alice", "prompt 0") == 1
    assert second.close()
    assert second.errors == 2


@pytest.mark.usefixtures("small_graphs")
def test_graphs_are_saved_now_and_then(open_cache: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_SAVE_S", 0.1)
    cache = open_cache(snapshots=tmp_path, queue=1000)
    for i in range(150):
        assert cache.insert(SPACE, f"prompt {i}", unit(i), latents(0.0, (0.5,)))
    assert until(lambda: [path.suffix for path in tmp_path.iterdir()] == [""])


def test_a_cache_whose_store_is_anothers_leaves_the_saved_graphs_alone(open_cache: Open, tmp_path: Path) -> None:
    (tmp_path / "graph").touch()
    store = BrokenStore()
    store.broken = True
    assert open_cache(store, snapshots=tmp_path).close()
    assert (tmp_path / "graph").exists()


def test_of_two_entries_of_one_prompt_a_restart_keeps_the_younger(open_cache: Open) -> None:
    """What is left when the process ended between the two halves of a replacement."""
    store = MemoryStore()
    for id, created in [(1, 20.0), (2, 30.0), (3, 10.0)]:
        header = Header(id, SPACE, "a red circle", unit(0), created, (0.5,), (0,))
        store.put(header, [np.full(SPACE.shape, id, np.float16)])
    cache = open_cache(store)
    (found,) = cache.find(SPACE, unit(0), "solver", ROWS, 1, 0)
    assert found is not None
    assert found.id == 2
    assert cache.flush(5.0)
    assert [header.id for header in store.headers()] == [2]


def test_a_smaller_budget_is_met_at_the_start(open_cache: Open) -> None:
    store = MemoryStore()
    first = open_cache(store)
    for i in range(10):
        put(first, f"prompt {i}", unit(i))
    first.close()
    open_cache(store, store.used_bytes // 2)
    assert store.used_bytes * 2 <= first.stats("alice").bytes


def test_what_the_store_has_lost_is_passed_over_and_repaired(open_cache: Open) -> None:
    store = MemoryStore()
    cache = open_cache(store)
    put(cache, "lost", unit(0))
    put(cache, "kept", at(0.97), value=1.0)
    (lost,) = [header.id for header in store.headers() if header.prompt == "lost"]
    store.remove(lost)
    (found,) = cache.find(SPACE, unit(0), "solver", ROWS, 1, 0)
    assert found is not None
    assert (found.latent == np.float16(1.5)).all()
    assert cache.flush(5.0)
    assert cache.stats("alice").counts["lost"] == 1
    (again,) = cache.find(SPACE, unit(0), "solver", ROWS, 1, 0)
    assert again is not None
    assert again.id == found.id
    assert cache.stats("alice").counts["lost"] == 1


def test_a_store_that_fails_means_misses_and_heals(open_cache: Open, caplog: pytest.LogCaptureFixture) -> None:
    store = BrokenStore()
    cache = open_cache(store)
    put(cache, "a red circle", unit(0))
    store.broken = True
    for _ in range(5):
        assert cache.find(SPACE, unit(0), "solver", ROWS, 2, 0) == [None, None]
    put(cache, "a blue circle", unit(1))
    assert cache.stats("alice").counts["error"] == 10
    assert cache.stats("alice").counts["dropped"] == 1
    assert cache.errors == 2  # the lookups after the first left the store alone
    assert len(caplog.records) == 1
    store.broken = False
    assert until(lambda: cache.find(SPACE, unit(0), "solver", ROWS, 1, 0) != [None])
    put(cache, "a blue circle", unit(1))
    assert cache.find(SPACE, unit(1), "solver", ROWS, 1, 0) != [None]


def test_a_store_that_fails_at_the_start_is_read_later(open_cache: Open) -> None:
    store = BrokenStore()
    first = open_cache(store)
    put(first, "a red circle", unit(0))
    first.close()
    store.broken = True
    second = open_cache(store)
    assert second.find(SPACE, unit(0), "solver", ROWS, 1, 0) == [None]
    store.broken = False
    assert until(lambda: second.find(SPACE, unit(0), "solver", ROWS, 1, 0) != [None])


def test_what_could_not_be_purged_from_the_store_is_purged_when_it_is_back(open_cache: Open) -> None:
    store = BrokenStore()
    cache = open_cache(store)
    put(cache, "a red circle", unit(0))
    store.broken = True
    threading.Timer(0.2, lambda: setattr(store, "broken", False)).start()
    assert cache.purge("alice") == 1
    assert cache.find(SPACE, unit(0), "solver", ROWS, 1, 0) == [None]
    assert list(store.headers()) == []


def test_inserts_never_wait_and_the_queue_is_bounded(open_cache: Open) -> None:
    store = BrokenStore()
    cache = open_cache(store, queue=3)
    store.gate.clear()
    began = time.monotonic()
    taken = [cache.insert(SPACE, f"prompt {i}", unit(i), latents(0.0)) for i in range(20)]
    assert time.monotonic() - began < 1.0
    assert 3 <= sum(taken) <= 4  # one may be with the store already
    assert cache.stats("alice").counts["dropped"] == 20 - sum(taken)
    assert not cache.flush(0.05)
    store.gate.set()
    assert cache.flush(5.0)
    assert cache.stats("alice").entries == sum(taken)


def test_a_store_that_hangs_does_not_keep_the_cache_from_closing(open_cache: Open) -> None:
    store = BrokenStore()
    cache = open_cache(store)
    store.gate.clear()
    cache.insert(SPACE, "a red circle", unit(0), latents(0.0))
    began = time.monotonic()
    assert not cache.close(0.1)
    assert time.monotonic() - began < 1.0
    assert not cache.insert(SPACE, "a red circle", unit(0), latents(0.0))
    assert cache.find(SPACE, unit(0), "solver", ROWS, 1, 0) == [None]
    store.gate.set()


@pytest.mark.parametrize(("prompt", "left"), [(None, []), ("prompt 0", ["prompt 1", "prompt 2"]), ("other", None)])
def test_purging_reaches_inserts_that_still_wait(open_cache: Open, prompt: str | None, left: list[str] | None) -> None:
    store = BrokenStore()
    cache = open_cache(store)
    bob = dataclasses.replace(SPACE, tenant="bob")
    store.gate.clear()
    for i in range(3):
        cache.insert(SPACE, f"prompt {i}", unit(i), latents(0.0))
    cache.insert(bob, "prompt 0", unit(0), latents(0.0))
    assert until(lambda: cache._writer._current is not None)
    cache.purge("alice", prompt)
    store.gate.set()
    assert cache.flush(5.0)
    kept = [header.prompt for header in store.headers() if header.space.tenant == "alice"]
    assert kept == (["prompt 0", "prompt 1", "prompt 2"] if left is None else left)
    assert cache.stats("bob").entries == 1


def test_purging_by_prompt_and_all(open_cache: Open) -> None:
    store = MemoryStore()
    cache = open_cache(store)
    other_size = dataclasses.replace(SPACE, guidance=3.0)
    for i in range(3):
        put(cache, f"prompt {i}", unit(i))
    put(cache, "prompt 0", unit(0), space=other_size)
    assert cache.purge("alice", "no such prompt") == 0
    assert cache.purge("alice", "prompt 0") == 2
    assert cache.find(SPACE, unit(0), "solver", ROWS, 1, 0) == [None]
    assert cache.purge("alice") == 2
    assert cache.purge("alice") == 0
    assert list(store.headers()) == []
    assert cache.stats("alice").bytes == 0


def test_stats_say_what_was_saved(open_cache: Open) -> None:
    cache = open_cache()
    put(cache, "a red circle", unit(0))
    cache.find(SPACE, unit(0), "solver", ROWS, 3, 0)
    cache.find(SPACE, at(0.67), "solver", ROWS, 1, 0)
    cache.find(SPACE, at(0.1), "solver", ROWS, 2, 0)
    stats = cache.stats("alice")
    assert (stats.counts["hit"], stats.counts["miss"]) == (4, 2)
    assert stats.hits_by_steps == {5: 1, 25: 3}
    assert stats.counts["rows_skipped"] == 3 * 5 + 1
    assert cache.totals().counts == stats.counts
    assert cache.totals().entries == 1


def test_a_purge_reaches_what_the_store_shows_only_later(open_cache: Open) -> None:
    store = BrokenStore()
    first = open_cache(store)
    for i in range(3):
        put(first, f"prompt {i}", unit(i))
    first.close()
    store.broken = True
    second = open_cache(store)
    assert second.purge("alice", "prompt 1") == 0
    assert second.purge("bob") == 0
    store.broken = False
    assert until(lambda: second.stats("alice").entries == 2)
    assert sorted(header.prompt for header in store.headers()) == ["prompt 0", "prompt 2"]
    put(second, "prompt 1", unit(1))
    assert second.stats("alice").entries == 3


class SharedMemory(MemoryStore):
    """What several servers see of one store."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[object, Change]] = []


class SharedMemoryStore:
    """One server's view of it. The log forgets all but its last `log_length` events."""

    def __init__(self, shared: SharedMemory, log_length: int = 10**6) -> None:
        self.damaged = 0
        self._shared = shared
        self._log_length = log_length

    @property
    def used_bytes(self) -> int:
        return self._shared.used_bytes

    def put(self, header: Header, latents: Sequence[Latent]) -> Header:
        header = self._shared.put(header, latents)
        self._shared.log.append((self, Change(header.id, None, header)))
        return header

    def get(self, id: int, level: float) -> Latent | None:
        return self._shared.get(id, level)

    def remove(self, id: int, level: float | None = None) -> None:
        self._shared.remove(id, level)
        self._shared.log.append((self, Change(id, level, None)))

    def headers(self) -> Iterator[Header]:
        return self._shared.headers()

    def count(self) -> int:
        return self._shared.count()

    def changes(self, after: str | None) -> Changes:
        end = len(self._shared.log)
        if after is None:
            return Changes(str(end), (), True)
        if end - int(after) > self._log_length:
            return Changes(str(end), (), False)
        events = tuple(change for server, change in self._shared.log[int(after) : end] if server is not self)
        return Changes(str(end), events, True)

    def close(self) -> None:
        pass


def is_found(cache: LatentCache, value: float) -> bool:
    (found,) = cache.find(SPACE, unit(0), "solver", ROWS, 1, 0)
    return found is not None and bool((found.latent == np.float16(value)).all())


@pytest.mark.parametrize("log_length", [10**6, 0])
def test_servers_that_share_a_store_follow_each_other(open_cache: Open, log_length: int) -> None:
    shared = SharedMemory()
    first, second = (open_cache(SharedMemoryStore(shared, log_length)) for _ in range(2))
    put(first, "a red circle", unit(0), value=1.0)
    put(first, "a blue circle", unit(1), value=1.0)
    assert until(lambda: second.stats("alice").entries == 2)
    put(second, "a red circle", unit(0), value=2.0)
    for cache in (first, second):
        assert until(lambda cache=cache: is_found(cache, 2.5))
        assert cache.stats("alice").entries == 2 == len(list(shared.headers()))
    assert first.purge("alice") == 2
    assert until(lambda: second.stats("alice").entries == 0)
    assert second.find(SPACE, unit(0), "solver", ROWS, 1, 0) == [None]


def test_levels_that_another_server_evicted_are_not_asked_for(open_cache: Open) -> None:
    shared = SharedMemory()
    other = SharedMemoryStore(shared)
    cache = open_cache(SharedMemoryStore(shared))
    put(cache, "a red circle", unit(0))
    (header,) = shared.headers()
    other.remove(header.id, 0.5)
    assert until(lambda: cache.stats("alice").bytes == shared.used_bytes)
    (found,) = cache.find(SPACE, unit(0), "solver", ROWS, 1, 0)
    assert found is not None
    assert found.alpha == 0.4
    assert cache.stats("alice").counts["lost"] == 0


class OnlyRed(MatchPredictor):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[bool] = []

    def may_match(self, embedding: Any) -> bool:
        return bool(embedding @ unit(0) > 0.5)

    def matched(self, embedding: Any) -> None:
        self.told.append(self.may_match(embedding))


def test_what_the_predictor_rules_out_is_not_looked_up(open_cache: Open) -> None:
    predictors: dict[str, OnlyRed] = {}

    def build() -> MatchPredictor:
        return predictors.setdefault(f"space {len(predictors)}", OnlyRed())

    cache = open_cache(predictor=build)
    bob = dataclasses.replace(SPACE, tenant="bob")
    put(cache, "a red circle", unit(0))
    put(cache, "a blue circle", unit(1))
    put(cache, "a red circle", unit(0), space=bob)
    assert cache.find(SPACE, unit(0), "solver", ROWS, 1, 0) != [None]
    assert cache.find(SPACE, unit(1), "solver", ROWS, 2, 0) == [None, None]
    counts = cache.stats("alice").counts
    assert (counts["hit"], counts["miss"], counts["skipped"]) == (1, 0, 2)
    assert [predictor.told for predictor in predictors.values()] == [[True], []]
