import contextlib
import secrets
import socket
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import redis

from cache.latent.store import Change, StoreError, StoreFullError
from cache.latent.store_redis import RedisStore
from tests.cache.latent.stores import LEVELS, REDIS_URL, a_header, latents_of


class Proxy:
    """Passes bytes on to Redis. Can cut connections, pass nothing on (silent) or no answers (mute), or give its own."""

    def __init__(self) -> None:
        self.silent = False
        self.mute = False
        self.answer: bytes | None = None
        target = redis.Redis.from_url(REDIS_URL).connection_pool.connection_kwargs
        self._target = (target.get("host", "127.0.0.1"), target.get("port", 6379))
        self._connections: list[socket.socket] = []
        self._port = 0
        self.start()
        self.url = f"redis://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, args=(self._listener,))
        self._accepting.start()

    def stop(self) -> None:
        """Nothing listens any more, and connections that were open are cut."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        self.cut()

    def cut(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._connections += [client, server]
            threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, requests: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self.answer is not None and requests:
                    source.sendall(self.answer)
                elif not (self.silent or (self.mute and not requests)):
                    target.sendall(data)


@pytest.fixture
def server():
    with redis.Redis.from_url(REDIS_URL) as server:
        yield server


@pytest.fixture
def name(server):
    name = f"test-{secrets.token_hex(8)}"
    yield name
    for key in server.scan_iter(f"headstart:{name}:*"):
        server.delete(key)


@pytest.fixture
def store(name):
    with closing(RedisStore(REDIS_URL, name)) as store:
        yield store


@pytest.fixture
def other(name):
    with closing(RedisStore(REDIS_URL, name)) as other:
        yield other


@pytest.fixture
def proxy():
    proxy = Proxy()
    yield proxy
    proxy.stop()


@pytest.fixture
def far(name, proxy):
    """A store behind the proxy."""
    with closing(RedisStore(proxy.url, name)) as store:
        yield store


def followed(changes):
    """(id, level, was it put) of each event."""
    return [(change.id, change.level, change.header is not None) for change in changes.events]


def test_servers_share_latents_and_follow_each_other(store, other):
    start = other.changes(None)
    assert start.events == ()
    header = store.put(a_header(), latents_of())
    second = store.put(a_header(1), latents_of(1))
    store.remove(header.id, LEVELS[0])
    store.remove(second.id)
    store.remove(second.id)  # gone already: no event
    assert np.array_equal(other.get(header.id, LEVELS[1]), latents_of()[1])
    changes = other.changes(start.cursor)
    assert changes.complete
    # What has been removed meanwhile is not put any more, and a put entry comes with the levels that are left.
    assert followed(changes) == [(header.id, None, True), (header.id, LEVELS[0], False), (second.id, None, False)]
    put = changes.events[0].header
    assert (put.levels, put.sizes) == (LEVELS[1:], header.sizes[1:])
    assert np.array_equal(put.embedding, header.embedding)
    again = other.changes(changes.cursor)
    assert again == (changes.cursor, (), True)
    assert store.changes(start.cursor).events == ()  # its own


def test_what_happens_while_headers_are_read_comes_as_a_change(store, other):
    cursor = other.changes(None).cursor
    headers = other.headers()
    header = store.put(a_header(), latents_of())
    assert [found.id for found in headers] == [header.id]
    assert followed(other.changes(cursor)) == [(header.id, None, True)]


def test_many_changes_come_in_parts(store, other, monkeypatch):
    monkeypatch.setattr("cache.latent.store_redis._EVENTS", 4)
    cursor = other.changes(None).cursor
    ids = [store.put(a_header(i), latents_of(0, 1)[:1] * 5).id for i in range(10)]
    found = []
    while (changes := other.changes(cursor)).events:
        assert len(changes.events) <= 4
        found += [change.id for change in changes.events]
        cursor = changes.cursor
    assert found == ids


def test_a_log_that_was_cut_is_noticed(server, name, other):
    with closing(RedisStore(REDIS_URL, name, log_length=10)) as store:
        cursor = other.changes(None).cursor
        for i in range(300):  # Redis cuts whole nodes of about a hundred events
            store.put(a_header(i, levels=(0.5,)), latents_of(0, 1, (1, 2, 2)))
        assert server.xlen(f"headstart:{name}:log") < 200
        changes = other.changes(cursor)
        assert changes.events == ()
        assert not changes.complete
        assert other.changes(changes.cursor).complete
        server.delete(f"headstart:{name}:log")  # a Redis that was emptied
        assert not other.changes(changes.cursor).complete


def test_entries_expire_by_tenant(server, name, other):
    with closing(RedisStore(REDIS_URL, name, ttl_s={"short": 0.3})) as store:
        cursor = other.changes(None).cursor
        short = store.put(a_header(1, tenant="short"), latents_of())
        long = store.put(a_header(2, tenant="long"), latents_of())
        assert store.get(short.id, LEVELS[0]) is not None
        assert server.pttl(f"headstart:{name}:latent:{short.id}:{LEVELS[0]}") <= 300
        assert server.pttl(f"headstart:{name}:latent:{long.id}:{LEVELS[0]}") == -1
        time.sleep(0.35)
        assert store.get(short.id, LEVELS[0]) is None
        # The next put takes it off the books and tells the others.
        third = store.put(a_header(3), latents_of())
        assert store.used_bytes == sum(long.sizes) + sum(third.sizes)
        assert Change(short.id, None, None) in other.changes(cursor).events
        assert {header.id for header in store.headers()} == {long.id, third.id}
        assert store.damaged == 0


def test_headers_that_are_gone_are_taken_off_the_books(server, name, store):
    header = store.put(a_header(), latents_of())
    server.delete(f"headstart:{name}:header:{header.id}")
    assert list(store.headers()) == []
    assert store.used_bytes == 0
    assert list(server.scan_iter(f"headstart:{name}:latent:*")) == []


def test_used_bytes_are_what_redis_says(server, name, store):
    for i in range(20):
        store.put(a_header(i), latents_of(i))
        store.put(a_header(i), latents_of(i, 5, (4, 32, 32)))
    keys = [key for key in server.scan_iter(f"headstart:{name}:*") if not key.endswith(b":log")]
    assert len(keys) == 40 * 6 + 2
    actual = sum(server.memory_usage(key, samples=0) for key in keys)
    assert store.used_bytes == pytest.approx(actual, rel=0.01)


@pytest.mark.parametrize("change", [lambda r: r[:-9] + bytes([r[-9] ^ 4]) + r[-8:], lambda r: r[:1000], lambda r: b""])
def test_damaged_latents_are_none_removed_and_counted(server, name, store, change):
    header = store.put(a_header(), latents_of())
    for level in LEVELS[:2]:
        key = f"headstart:{name}:latent:{header.id}:{level}"
        server.set(key, change(server.get(key)))
    assert store.get(header.id, LEVELS[0]) is None
    assert store.damaged == 1
    (found,) = store.headers()
    assert found.levels == LEVELS[1:]
    assert store.get(header.id, LEVELS[1]) is None
    assert store.damaged == 2
    assert store.get(header.id, LEVELS[2]) is not None


def test_damaged_headers_are_passed_over_removed_and_counted(server, name, store):
    damaged, good = store.put(a_header(), latents_of()), store.put(a_header(1), latents_of(1))
    server.set(f"headstart:{name}:header:{damaged.id}", b"nonsense")
    assert [header.id for header in store.headers()] == [good.id]
    assert store.damaged == 1
    assert store.get(damaged.id, LEVELS[0]) is None
    assert store.used_bytes == sum(good.sizes)


def every_call(store, id):
    return [
        lambda: store.get(id, LEVELS[0]),
        lambda: store.put(a_header(9), latents_of()),
        lambda: store.remove(1),
        lambda: list(store.headers()),
        lambda: store.used_bytes,
        lambda: store.changes(None),
        lambda: store.changes("1-1"),
    ]


def test_gone_and_back(far, proxy):
    header = far.put(a_header(), latents_of())
    proxy.stop()
    for call in every_call(far, header.id):
        start = time.monotonic()
        with pytest.raises(StoreError, match=r"^Redis: "):
            call()
        assert time.monotonic() - start < 0.3
    proxy.start()
    for call in every_call(far, header.id):
        call()
    assert np.array_equal(far.get(header.id, LEVELS[0]), latents_of()[0])


def test_cut_off_and_back(far, proxy):
    """A server that was restarted: connections that wait in the pool are dead."""
    header = far.put(a_header(), latents_of())
    proxy.cut()
    with contextlib.suppress(StoreError):
        far.get(header.id, LEVELS[0])
    assert np.array_equal(far.get(header.id, LEVELS[0]), latents_of()[0])


def test_silent_in_the_middle_and_back(far, proxy):
    header = far.put(a_header(), latents_of())
    proxy.silent = True
    for call in every_call(far, header.id):
        start = time.monotonic()
        with pytest.raises(StoreError, match=r"^Redis: .*[Tt]ime"):
            call()
        assert time.monotonic() - start < 0.3  # the promise is 0.2 s; the rest is this machine
    proxy.silent = False
    assert np.array_equal(far.get(header.id, LEVELS[0]), latents_of()[0])


def test_a_put_without_an_answer_is_told_by_the_log(far, store, proxy):
    """It may have been done all the same: then nobody would ever evict it."""
    cursor = far.changes(None).cursor
    assert far.put(a_header(1), latents_of())
    proxy.mute = True
    with pytest.raises(StoreError):
        far.put(a_header(2), latents_of())
    proxy.mute = False
    (lost,) = (header for header in store.headers() if header.prompt == "a red fox, 2")
    assert followed(far.changes(cursor)) == [(lost.id, None, True)]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", StoreFullError),
        (b"-READONLY You can't write against a read only replica.\r\n", StoreError),
        (b"-LOADING Redis is loading the dataset in memory\r\n", StoreError),
        (b"-MISCONF Redis is configured to save RDB snapshots\r\n", StoreError),
        (b"nonsense\r\n", StoreError),
    ],
)
def test_what_redis_refuses(far, proxy, answer, error):
    far.put(a_header(), latents_of())
    proxy.answer = answer
    with pytest.raises(error) as raised:
        far.remove(1)  # a request so short that the proxy has it in one piece
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)
    proxy.answer = None
    assert far.put(a_header(2), latents_of())


def test_an_address_that_does_not_answer():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        with closing(RedisStore(f"redis://127.0.0.1:{port}", "test")) as store:
            start = time.monotonic()
            with pytest.raises(StoreError):
                store.get(1, 0.5)
            assert time.monotonic() - start < 0.3


def test_an_url_that_is_none():
    with pytest.raises(ValueError, match="scheme"):
        RedisStore("http://127.0.0.1", "test")
