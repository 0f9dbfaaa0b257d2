import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import lmdb
import numpy as np
import pytest

from cache.latent.store import StoreError, StoreFullError
from cache.latent.store_lmdb import LmdbStore
from tests.cache.latent.stores import LEVELS, a_header, latents_of

BUDGET = 64 << 20


def eventually(attempt, seconds=5.0):
    """The result of `attempt` once it raises StoreError no more."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except StoreError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextmanager
def environment(folder):
    """The store's files, opened behind its back."""
    with lmdb.open(str(folder), max_dbs=2, map_size=BUDGET * 2) as opened:
        yield opened, opened.open_db(b"headers"), opened.open_db(b"latents")


def test_entries_survive_a_restart(tmp_path):
    with closing(LmdbStore(tmp_path / "new" / "folder", BUDGET)) as store:
        header = store.put(a_header(), latents_of())
        store.remove(header.id, LEVELS[0])
        store.flush()
        used = store.used_bytes
    with closing(LmdbStore(tmp_path / "new" / "folder", BUDGET)) as store:
        (found,) = store.headers()
        assert (found.id, found.levels, found.sizes) == (header.id, LEVELS[1:], header.sizes[1:])
        assert np.array_equal(store.get(header.id, LEVELS[3]), latents_of()[3])
        assert store.get(header.id, LEVELS[0]) is None
        assert store.used_bytes == used


def test_used_bytes_are_the_pages_in_the_file(tmp_path):
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        headers = [store.put(a_header(i), latents_of(i)) for i in range(100)]
        accounted = sum(sum(header.sizes) for header in headers)
        assert store.used_bytes == pytest.approx(accounted, rel=0.01)
        store.flush()
        assert store.used_bytes == pytest.approx(accounted, rel=0.01)
        assert os.path.getsize(tmp_path / "data.mdb") == pytest.approx(accounted, rel=0.01)
        for header in headers:  # holes: the header's pages stay
            for level in LEVELS[:4]:
                store.remove(header.id, level)
        expected = store.used_bytes
        store.flush()
        assert store.used_bytes == pytest.approx(expected, rel=0.01)


READER = """
import struct, sys, lmdb
environment = lmdb.open(sys.argv[1], max_dbs=2, readonly=True)
headers = environment.open_db(b"headers", create=False)
print(len(environment.begin().get(struct.pack(">q", int(sys.argv[2])), db=headers)))
"""


def test_what_is_put_is_in_the_file_within_a_second(tmp_path):
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        header = store.put(a_header(), latents_of())
        time.sleep(1)
        found = subprocess.check_output([sys.executable, "-c", READER, tmp_path, str(header.id)], text=True)
        assert int(found) > 2048


def test_many_writes_share_a_transaction(tmp_path):
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        headers = [store.put(a_header(i), latents_of(i)) for i in range(40)]
        for header in headers[:20]:
            store.remove(header.id)
        store.flush()
    with environment(tmp_path) as (opened, *_):
        assert opened.info()["last_txnid"] < 10


def test_full_budget_and_room_again(tmp_path):
    with closing(LmdbStore(tmp_path, 4 << 20)) as store:
        headers = []

        def put_on():
            while True:
                headers.append(store.put(a_header(), latents_of()))

        with pytest.raises(StoreFullError, match=f"full: {tmp_path}"):
            put_on()
        assert 0.95 * (4 << 20) < store.used_bytes <= 4 << 20
        # Room is there at once, and again and again: freed pages are used anew.
        for i in range(100):
            store.remove(headers.pop(0).id)
            headers.append(store.put(a_header(i), latents_of(i)))
            if i % 10 == 0:
                store.flush()
        store.flush()
        assert store.used_bytes <= 4 << 20
        assert len(list(store.headers())) == len(headers)
        assert os.path.getsize(tmp_path / "data.mdb") <= (4 << 20) * 17 // 16 + (8 << 20)


def test_a_smaller_budget_after_a_restart(tmp_path):
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        headers = [store.put(a_header(i), latents_of(i)) for i in range(150)]
    with closing(LmdbStore(tmp_path, 1 << 20)) as store:
        assert len(list(store.headers())) == 150
        with pytest.raises(StoreFullError):
            store.put(a_header(), latents_of())
        for header in headers[2:]:
            store.remove(header.id)
        store.put(a_header(), latents_of())
        store.flush()
        assert len(list(store.headers())) == 3


def test_one_store_at_a_time(tmp_path):
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        store.put(a_header(), latents_of())
        with closing(LmdbStore(tmp_path, BUDGET)) as second:
            with pytest.raises(StoreError, match=f"cache folder {tmp_path} is in use by another process"):
                second.put(a_header(), latents_of())
            with pytest.raises(StoreError, match="in use"):
                list(second.headers())
            store.close()
            assert len(list(second.headers())) == 1  # healed


def plant(folder, table, change):
    """Changes every record of a table behind the store's back; returns how many there were."""
    with environment(folder) as (opened, headers, latents), opened.begin(write=True) as transaction:
        db = {"headers": headers, "latents": latents}[table]
        records = list(transaction.cursor(db))
        for key, record in records:
            transaction.put(key, change(record), db=db)
    return len(records)


def flipped(record):
    return record[:-9] + bytes([record[-9] ^ 4]) + record[-8:]


@pytest.mark.parametrize("change", [flipped, lambda record: record[: len(record) // 2], lambda record: b""])
def test_damaged_latents_are_none_removed_and_counted(tmp_path, change):
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        header = store.put(a_header(), latents_of())
    assert plant(tmp_path, "latents", change) == len(LEVELS)
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        assert store.get(header.id, LEVELS[0]) is None
        assert store.damaged == 1
        (found,) = store.headers()
        assert found.levels == LEVELS[1:]
        assert [store.get(header.id, level) for level in LEVELS] == [None] * 5
        assert store.damaged == 5
        assert list(store.headers()) == []
        assert store.get(header.id, LEVELS[1]) is None
        assert store.damaged == 5


@pytest.mark.parametrize("change", [flipped, lambda record: b"nonsense"])
def test_damaged_headers_are_passed_over_removed_and_counted(tmp_path, change):
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        for i in range(3):
            store.put(a_header(i), latents_of(i))
    assert plant(tmp_path, "headers", change) == 3
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        good = store.put(a_header(), latents_of())
        assert [header.id for header in store.headers()] == [good.id]
        assert store.damaged == 3
        store.remove(good.id)
        store.flush()
        assert store.used_bytes < 4 * 4096  # the latents of damaged headers are gone too


def test_records_under_each_others_keys_are_damage(tmp_path):
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        header = store.put(a_header(levels=LEVELS[:2]), latents_of(0, 2))
    with environment(tmp_path) as (opened, _, latents), opened.begin(write=True) as transaction:
        (first, one), (second, two) = transaction.cursor(latents)
        transaction.put(first, two, db=latents)
        transaction.put(second, one, db=latents)
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        assert store.get(header.id, LEVELS[0]) is None
        assert store.damaged == 1


def test_a_file_that_is_no_database_is_set_aside(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"this is no database " * 1000)
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        store.put(a_header(), latents_of())
        store.flush()
        assert store.damaged == 1
        assert len(list(store.headers())) == 1
    assert (tmp_path / "data.mdb.damaged").read_bytes().startswith(b"this is no database")


@contextmanager
def file_size_limit(size):
    """What a full disk does to LMDB: writes past the limit fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_and_healing(tmp_path):
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        kept = store.put(a_header(), latents_of())
        store.flush()
        with file_size_limit(os.path.getsize(tmp_path / "data.mdb") + 8192):
            waiting = store.put(a_header(1), latents_of(1))  # nobody knows yet
            with pytest.raises(StoreError, match=str(tmp_path)):
                store.flush()
            with pytest.raises(StoreError, match=str(tmp_path)):
                store.put(a_header(2), latents_of(2))
            assert np.array_equal(store.get(kept.id, LEVELS[0]), latents_of()[0])
            assert np.array_equal(store.get(waiting.id, LEVELS[0]), latents_of(1)[0])
        later = eventually(lambda: store.put(a_header(3), latents_of(3)))
        eventually(store.flush)
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        assert {header.id for header in store.headers()} == {kept.id, waiting.id, later.id}
        assert np.array_equal(store.get(waiting.id, LEVELS[2]), latents_of(1)[2])
        assert store.damaged == 0


@contextmanager
def somebody_else():
    """Root may write everywhere: without its rights for a while. Nobody else needs this."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_read_only_folder_and_healing(tmp_path):
    for parent in tmp_path.parents:
        if parent.owner() == tmp_path.owner() and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    folder = tmp_path / "latents"
    folder.mkdir(mode=0o555)
    with closing(LmdbStore(folder, BUDGET)) as store:
        with somebody_else():
            with pytest.raises(StoreError, match=f"cache folder {folder}: .*[Pp]ermission denied"):
                store.put(a_header(), latents_of())
            with pytest.raises(StoreError, match=str(folder)):
                list(store.headers())
            with pytest.raises(StoreError, match=str(folder)):
                store.get(1, 0.5)
        folder.chmod(0o755)
        store.put(a_header(), latents_of())
        assert len(list(store.headers())) == 1


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with closing(LmdbStore(tmp_path / "file" / "folder", BUDGET)) as store, pytest.raises(StoreError, match="file"):
        store.put(a_header(), latents_of())


def test_an_environment_that_fails_is_opened_anew(tmp_path):
    """LMDB refuses all use of an environment after some errors."""
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        header = store.put(a_header(), latents_of())
        store.flush()
        store._failed(lmdb.PanicError("as after a failed write of the meta page"))
        assert store.get(header.id, LEVELS[0]) is not None
        store._environment.close()
        with pytest.raises(StoreError, match=str(tmp_path)):
            store.get(header.id, LEVELS[0])
        assert store.get(header.id, LEVELS[0]) is not None
        store.put(a_header(1), latents_of(1))
        store.flush()


def test_close_twice_and_without_use(tmp_path):
    store = LmdbStore(tmp_path / "never", BUDGET)
    store.close()
    store.close()
    assert not (tmp_path / "never").exists()


def test_reads_go_on_while_the_file_grows_and_is_synced(tmp_path):
    """No read waits for a transaction, and none sees half an entry."""
    with closing(LmdbStore(tmp_path, BUDGET)) as store:
        known = store.put(a_header(), latents_of())
        store.flush()
        stop, slowest = threading.Event(), [0.0]

        def read():
            while not stop.is_set():
                start = time.perf_counter()
                assert store.get(known.id, LEVELS[2]) is not None
                slowest[0] = max(slowest[0], time.perf_counter() - start)

        reader = threading.Thread(target=read)
        reader.start()
        for i in range(150):
            store.put(a_header(i), latents_of(0))
        store.flush()
        stop.set()
        reader.join()
        assert os.path.getsize(tmp_path / "data.mdb") > 20 << 20
        assert slowest[0] < 0.25


WRITER = """
import sys, time
from dataclasses import replace
from pathlib import Path
from cache.latent.keys import random_id
from cache.latent.store_lmdb import LmdbStore
from tests.cache.latent.stores import LEVELS, a_header, latents_of

store = LmdbStore(Path(sys.argv[1]), 64 << 20)
kept = [header.id for header in store.headers()]
template, latents = a_header(), latents_of()
print("open", flush=True)
while True:
    header = store.put(replace(template, id=random_id()), latents)
    print("put", header.id, time.monotonic(), flush=True)
    kept.append(header.id)
    if len(kept) > 40:
        gone = kept.pop(0)
        store.remove(gone)
        print("gone", gone, time.monotonic(), flush=True)
    time.sleep(0.01)
"""


class Killed:
    """A folder whose writer is killed again and again."""

    def __init__(self, folder):
        self.folder = folder
        self.there = set()

    def start(self):
        self.writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, self.folder],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )

    def kill(self):
        self.killed = time.monotonic()
        self.writer.send_signal(signal.SIGKILL)

    def check(self, latents):
        lines, _ = self.writer.communicate()
        put, gone = dict.fromkeys(self.there, 0.0), {}
        for line in lines.splitlines():
            if line.count(" ") == 2:  # the last one may be cut short
                what, id, at = line.split(" ")
                (put if what == "put" else gone)[int(id)] = float(at)
        with closing(LmdbStore(self.folder, BUDGET)) as store:
            headers = list(store.headers())
            for header in headers:
                assert header.levels == LEVELS
                for level, latent in zip(LEVELS, latents, strict=True):
                    assert np.array_equal(store.get(header.id, level), latent)
            assert store.damaged == 0
        self.there = {header.id for header in headers}
        assert {id for id, at in put.items() if at < self.killed - 1 and id not in gone} <= self.there
        assert not {id for id, at in gone.items() if at < self.killed - 1} & self.there


def test_kill_minus_9_during_writes_twenty_times(tmp_path):
    """What was acknowledged more than a second before the kill is there; nothing that is there is damaged."""
    moments, latents = random.Random(4), latents_of()
    folders = [Killed(tmp_path / str(i)) for i in range(4)]
    for _ in range(5):
        for folder in folders:
            folder.start()
        for folder in folders:
            assert folder.writer.stdout.readline() == "open\n"
        for folder in folders:
            time.sleep(moments.uniform(0.02, 0.8))
            folder.kill()
        for folder in folders:
            folder.check(latents)
    assert all(len(folder.there) > 20 for folder in folders)
