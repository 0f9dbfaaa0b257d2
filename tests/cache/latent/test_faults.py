"""The cache on stores in real trouble: lookups are misses, each event is counted, one line a minute is logged, and what
was wrong is over when its cause is gone."""

from __future__ import annotations

import logging
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.latent import lookup, store_lmdb, writer
from cache.latent.keys import KeySpace
from cache.latent.lookup import LatentCache
from cache.latent.policy import nirvana
from cache.latent.store import Store
from cache.latent.store_lmdb import LmdbStore
from cache.latent.store_redis import RedisStore
from tests.cache.latent.test_lookup import BrokenStore, until
from tests.cache.latent.test_store_lmdb import file_size_limit, somebody_else
from tests.cache.latent.test_store_redis import Proxy, name, proxy, server  # noqa: F401

LEVELS = {5: 0.1, 10: 0.2, 15: 0.3, 20: 0.4, 25: 0.5}
ROWS = [0.02, 0.08, 0.18, 0.28, 0.38, 0.48, 0.8]
SPACE = KeySpace("alice", "shapes@1", "linear", (), (4, 32, 32), 7.5, "")
BUDGET = 64 << 20

Open = Callable[..., LatentCache]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    for module in (lookup, writer, store_lmdb):
        monkeypatch.setattr(module, "_RETRY_S", 0.02)


@pytest.fixture
def open_cache(caplog: pytest.LogCaptureFixture) -> Iterator[Open]:
    caches: list[LatentCache] = []

    def build(store: Store, budget: int = BUDGET) -> LatentCache:
        caches.append(LatentCache(store, budget, nirvana(LEVELS), queue=5000))
        return caches[-1]

    yield build
    for cache in caches:
        assert cache.close()
    # However much went wrong. Nothing here lasts a minute.
    assert [record.name for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == [
        lookup.__name__
    ]


def embedding(number: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    vector = np.random.default_rng(number).standard_normal(64).astype(np.float32)
    return vector / np.linalg.norm(vector)


def insert(cache: LatentCache, number: int, side: int = 32) -> None:
    shape = (4, side, side)
    space = KeySpace("alice", "shapes@1", "linear", (), shape, 7.5, "")
    values = np.random.default_rng(number).standard_normal(shape).astype(np.float16)
    assert cache.insert(space, f"prompt {number}", embedding(number), dict.fromkeys(LEVELS.values(), values))


def is_found(cache: LatentCache, number: int) -> bool:
    (found,) = cache.find(SPACE, embedding(number), "solver", ROWS, 1, 0)
    return found is not None


def until_kept(cache: LatentCache, number: int) -> None:
    """Inserts it until it is found."""

    def kept() -> bool:
        insert(cache, number)
        assert cache.flush(10)
        return is_found(cache, number)

    assert until(kept, 20)


def test_a_disk_that_is_full(open_cache: Open, tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, BUDGET)
    cache = open_cache(store)
    until_kept(cache, 0)
    store.flush()
    with file_size_limit(os.path.getsize(tmp_path / "data.mdb") + 8192):
        for number in range(1, 10):
            insert(cache, number)
            assert cache.flush(10)
            time.sleep(0.1)
        assert is_found(cache, 0)  # what is there can be read
        assert cache.errors > 3
        assert cache.stats("alice").counts["dropped"] > 3
    until_kept(cache, 10)


def test_a_map_that_is_full(open_cache: Open, tmp_path: Path) -> None:
    """Entries of another size leave pages that are free but apart, in which long records do not fit."""
    budget = 12 << 20
    store = LmdbStore(tmp_path, budget)
    cache = open_cache(store, budget)
    for number in range(300):
        insert(cache, number)
    assert cache.flush(60)
    store.flush()
    with store._transacting, store._mapped:  # a large budget meets the end of the map's reserve by itself
        store._environment.set_mapsize(os.path.getsize(tmp_path / "data.mdb") + (1 << 20))
    levels = cache._catalogue.levels()
    for id, level in random.Random(0).sample(levels, len(levels) * 2 // 3):
        cache._catalogue.hit(id, level)
    failed = stored = 0
    for number in range(1000, 1030):
        before = cache.stats("alice").counts
        insert(cache, number, side=128)
        assert cache.flush(10)
        time.sleep(0.02)
        counts = cache.stats("alice").counts
        failed += counts["dropped"] - before["dropped"]
        stored += failed > 0 and counts["stored"] - before["stored"]
    assert failed > 0
    assert stored > 5  # after a failure, again and again
    assert cache.errors == failed
    assert cache._store.used_bytes <= 1.01 * budget


def test_a_folder_that_is_read_only(open_cache: Open, tmp_path: Path) -> None:
    for parent in tmp_path.parents:
        if parent.owner() == tmp_path.owner() and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    folder = tmp_path / "latents"
    folder.mkdir(mode=0o555)
    with somebody_else():
        cache = open_cache(LmdbStore(folder, BUDGET))
        insert(cache, 0)
        assert cache.flush(10)
        assert not is_found(cache, 0)
        assert until(lambda: cache.errors > 3)
    folder.chmod(0o755)
    until_kept(cache, 1)


@pytest.mark.parametrize("trouble", ["gone", "silent", "full"])
def test_redis_in_trouble_between_two_requests(open_cache: Open, name: str, proxy: Proxy, trouble: str) -> None:  # noqa: F811
    cache = open_cache(RedisStore(proxy.url, name))
    until_kept(cache, 0)
    if trouble == "gone":
        proxy.stop()
    elif trouble == "silent":
        proxy.silent = True
    else:
        proxy.answer = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    begun = time.monotonic()
    assert not is_found(cache, 0)
    assert time.monotonic() - begun < 0.3
    insert(cache, 1)
    assert until(lambda: cache.errors > 3)
    assert cache.stats("alice").counts["error"] >= 1
    if trouble == "gone":
        proxy.start()
    proxy.silent, proxy.answer = False, None
    until_kept(cache, 2)
    assert until(lambda: is_found(cache, 0) or trouble == "full")


def test_an_index_out_of_step_with_its_store(tmp_path: Path) -> None:
    """What the index has and the store has not is a miss when it is asked for, and then forgotten."""
    store = LmdbStore(tmp_path, BUDGET)
    cache = LatentCache(store, BUDGET, nirvana(LEVELS))
    until_kept(cache, 0)
    (header,) = store.headers()
    store.remove(header.id)
    for lost in range(1, 6):  # the deepest first
        assert not is_found(cache, 0)
        assert cache.flush(10)
        assert cache.stats("alice").counts["lost"] == lost
    assert cache.stats("alice").entries == 0
    until_kept(cache, 0)
    assert cache.errors == 0
    assert cache.close()


def test_trouble_is_counted_each_time_and_logged_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(lookup.time, "monotonic", lambda: now[0])
    faults = lookup._Faults()
    for _ in range(100):
        faults.report(OSError("no"))
        now[0] += 1.5
    assert faults.count == 100
    assert [record.getMessage() for record in caplog.records] == [
        f"cache: no ({count} failures so far)" for count in (1, 41, 81)
    ]


def test_a_store_that_failed_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests do not wait for it one after the other."""
    monkeypatch.setattr(lookup, "_RETRY_S", 30.0)
    store = BrokenStore()
    cache = LatentCache(store, BUDGET, nirvana(LEVELS))
    until_kept(cache, 0)
    store.broken = True
    assert not is_found(cache, 0)
    store.broken = False
    assert not is_found(cache, 0)
    assert cache.errors == 1
    assert cache.close()
