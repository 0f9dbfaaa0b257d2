"""What every store does."""

import secrets
import threading
from contextlib import closing

import numpy as np
import pytest
import redis

from cache.latent.store import MemoryStore, with_sizes
from cache.latent.store_lmdb import LmdbStore
from cache.latent.store_redis import RedisStore
from tests.cache.latent.stores import LEVELS, REDIS_URL, a_header, latents_of

BUDGET = 64 << 20


@pytest.fixture(params=["memory", "lmdb", "redis"])
def store(request, tmp_path):
    if request.param == "memory":
        opened = MemoryStore()
    elif request.param == "lmdb":
        opened = LmdbStore(tmp_path, BUDGET)
    else:
        opened = RedisStore(REDIS_URL, f"test-{secrets.token_hex(8)}")
    with closing(opened):
        yield opened
        if isinstance(opened, RedisStore):
            for header in opened.headers():
                opened.remove(header.id)
            with redis.Redis.from_url(REDIS_URL) as server:
                prefix = opened._prefix
                server.delete(prefix + "log", prefix + "bytes")
                assert list(server.scan_iter(f"{prefix}*")) == []


def test_what_is_put_is_got(store):
    header, latents = a_header(), latents_of()
    stored = store.put(header, latents)
    assert stored.levels == LEVELS
    assert len(stored.sizes) == len(LEVELS)
    for level, latent in zip(LEVELS, latents, strict=True):
        assert np.array_equal(store.get(header.id, level), latent)
    (found,) = store.headers()
    assert (found.id, found.space, found.prompt, found.created) == (
        header.id,
        header.space,
        header.prompt,
        header.created,
    )
    assert (found.levels, found.sizes) == (stored.levels, stored.sizes)
    assert np.array_equal(found.embedding, header.embedding)
    assert store.damaged == 0


def test_what_was_never_put_is_none(store):
    assert store.get(1, 0.5) is None
    assert list(store.headers()) == []
    store.remove(1)
    store.remove(1, 0.5)
    assert store.used_bytes == 0


def test_a_level_is_removed_alone_and_the_entry_with_its_last(store):
    header = a_header()
    store.put(header, latents_of())
    store.remove(header.id, LEVELS[1])
    store.remove(header.id, 0.999)  # a level that never was
    assert store.get(header.id, LEVELS[1]) is None
    assert store.get(header.id, LEVELS[2]) is not None
    (found,) = store.headers()
    assert found.levels == (LEVELS[0], *LEVELS[2:])
    assert len(found.sizes) == 4
    for level in found.levels:
        store.remove(header.id, level)
    assert list(store.headers()) == []


def test_an_entry_is_removed_whole(store):
    header, other = a_header(1), a_header(2)
    store.put(header, latents_of())
    store.put(other, latents_of())
    store.remove(header.id)
    assert [store.get(header.id, level) for level in LEVELS] == [None] * 5
    assert [found.id for found in store.headers()] == [other.id]
    assert store.get(other.id, LEVELS[0]) is not None


def test_the_same_id_again_replaces(store):
    header = a_header()
    store.put(header, latents_of(1))
    used = store.used_bytes
    shorter = type(header)(header.id, header.space, "new", header.embedding, header.created, LEVELS[:2], ())
    store.put(shorter, latents_of(2, 2))
    (found,) = store.headers()
    assert (found.prompt, found.levels) == ("new", LEVELS[:2])
    assert np.array_equal(store.get(header.id, LEVELS[0]), latents_of(2)[0])
    assert store.get(header.id, LEVELS[4]) is None
    assert store.used_bytes < used / 2


def test_sizes_add_up_to_the_bytes_in_use(store):
    headers = [store.put(a_header(i), latents_of(i)) for i in range(20)]
    assert store.used_bytes == pytest.approx(sum(sum(header.sizes) for header in headers), rel=0.01)
    for header in headers[:10]:
        store.remove(header.id)
    assert store.used_bytes == pytest.approx(sum(sum(header.sizes) for header in headers[10:]), rel=0.01)
    for header in headers[10:]:
        for level in LEVELS:
            store.remove(header.id, level)
    assert store.used_bytes < 0.01 * sum(map(sum, (header.sizes for header in headers)))


def test_latents_that_the_header_does_not_describe(store):
    header = a_header()
    for latents in (latents_of(0, 4), []):
        with pytest.raises(ValueError, match="latents for the levels"):
            store.put(header, latents)
    with pytest.raises(ValueError, match="latents for the levels"):
        store.put(a_header(levels=(0.5, 0.5)), latents_of(0, 2))
    with pytest.raises(ValueError, match="a latent is"):
        store.put(header, [*latents_of(0, 4), np.zeros((4, 64, 64))])
    assert list(store.headers()) == []


def test_what_is_got_can_be_changed(store):
    header, latents = a_header(), latents_of()
    store.put(header, latents)
    store.get(header.id, LEVELS[0])[:] = 0
    assert np.array_equal(store.get(header.id, LEVELS[0]), latents[0])


def test_readers_beside_the_writer(store):
    """Every read is what was put or None, whatever the writer does."""
    entries = [(a_header(i, levels=LEVELS[:2]), latents_of(i, 2)) for i in range(6)]
    wrong, stop = [], threading.Event()

    def read(seed):
        random = np.random.default_rng(seed)
        while not stop.is_set():
            header, latents = entries[random.integers(len(entries))]
            found = store.get(header.id, LEVELS[1])
            if found is not None and not np.array_equal(found, latents[1]):
                wrong.append(header.id)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(15):
        for header, latents in entries:
            store.put(header, latents)
        store.remove(entries[0][0].id)
        store.remove(entries[1][0].id, LEVELS[1])
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert store.damaged == 0


def test_sizes_share_the_header_to_the_byte():
    header = with_sizes(a_header(), [10, 20, 30, 40, 50], 13)
    assert header.sizes == (13, 23, 33, 42, 52)
