"""Latents in a folder on the local disk, in LMDB: memory-mapped reads, writes gathered into durable transactions.

`put` and `remove` change a table in memory, which reads look at first; a thread commits what has gathered a quarter of
a second later in one transaction, with its fsync. So a call costs no disk, an entry that is put and the entries that
make room for it share a sync, and whatever the end (kill -9, power), no more than the last second is lost and nothing
is half there. The map's address space is reserved once at the budget's size: the file grows as it is written, never the
map, so that reads have nothing to wait for.

One process at a time uses a folder; servers that share latents use Redis.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb

from cache.latent.codec import DamagedRecordError, decode_header, decode_latent, encode_header
from cache.latent.keys import Header
from cache.latent.store import (
    Latent,
    StoreError,
    StoreFullError,
    records_of,
    with_sizes,
    without_level,
)

_HEADER_KEY = struct.Struct(">q")  # id
_LATENT_KEY = struct.Struct(">qd")  # id, alpha: an entry's latents are neighbours
_PAGE = min(mmap.PAGESIZE, 1 << 15)
_PAGE_HEAD = 16
_LEAF_NODE = ((_PAGE - _PAGE_HEAD) // 2 & ~1) - 10  # LMDB: a key and record longer than this get pages of their own
_GATHER_S = 0.25
_RETRY_S = 0.5
_WAITING_BYTES = 64 << 20
_SLOW_DISK_S = 5.0
_CHUNK = 256  # headers read in one transaction

_Changes = dict[bytes, bytes | None]  # key to record, or None where it was removed


class LmdbStore:
    """`budget_bytes` bounds the pages in use, and the file but for 1/16 and 8 MiB of freed pages that wait for reuse.

    The folder is made, opened and reopened when a call needs it: a fault at start heals like any other.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.damaged = 0
        self._folder = folder
        self._budget = budget_bytes
        self._owner: int | None = None  # the locked file that says whose folder it is
        self._environment: lmdb.Environment | None = None
        self._tables: dict[int, Any] = {}  # by the size of their keys
        self._mapped = threading.Lock()  # held while the map is read, and to open or close it
        self._broken = False  # the environment has failed and must be reopened
        self._transacting = threading.RLock()  # held while something is written; only ever tried under _mapped

        self._changed = threading.Condition(threading.RLock())  # guards all below; taken before _mapped
        self._pending: _Changes = {}
        self._writing: _Changes = {}
        self._pending_bytes = 0  # length of the records in _pending
        self._pages = 0  # bytes of the pages in use after the last commit
        self._pending_pages = 0  # what _pending and _writing will add to them
        self._writing_pages = 0
        self._fault: StoreError | None = None
        self._hurry = False
        self._closing = False
        self._thread = threading.Thread(target=self._commit_all, name="latent-store", daemon=True)
        self._thread.start()

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use, to within the tree's own (about 0.2%); exact after each commit."""
        with self._changed:
            return self._pages + self._pending_pages + self._writing_pages

    def put(self, header: Header, latents: Sequence[Latent]) -> Header:
        records = records_of(header, latents)
        sizes = [_stored_bytes(_LATENT_KEY.size, len(record)) for record in records.values()]
        # A header's record is as long with its sizes as without, but for their digits.
        header_bytes = _stored_bytes(_HEADER_KEY.size, len(encode_header(with_sizes(header, sizes, 0))))
        header = with_sizes(header, sizes, header_bytes)
        with self._changed:
            self.remove(header.id)
            if not self._changed.wait_for(lambda: self._pending_bytes < _WAITING_BYTES, timeout=_SLOW_DISK_S):
                raise StoreError(f"{self._folder} does not take in writes as fast as they come")
            self._raise_fault()
            if self.used_bytes + sum(header.sizes) > self._budget:
                raise StoreFullError(f"full: {self._folder} holds {self.used_bytes} of {self._budget} bytes")
            self._change(_HEADER_KEY.pack(header.id), encode_header(header), 0)
            for level, record in records.items():
                self._change(_LATENT_KEY.pack(header.id, level), record, 0)
        return header

    def get(self, id: int, level: float) -> Latent | None:
        key = _LATENT_KEY.pack(id, level)
        record = self._read(key)
        if record is None:
            return None
        try:
            return decode_latent(record, id, level)
        except DamagedRecordError:
            with self._changed:
                if self._read(key) == record:  # nobody else has found it meanwhile
                    self.damaged += 1
                    self._drop(key)
                    self.remove(id, level)
            return None

    def remove(self, id: int, level: float | None = None) -> None:
        header_key = _HEADER_KEY.pack(id)
        with self._changed:
            record = self._read(header_key)
            if record is None:
                return
            try:
                header = decode_header(record, id)
            except DamagedRecordError:
                self.damaged += 1
                self._remove_all(id)
                return
            left = None if level is None else without_level(header, level)
            if left is None:
                self._remove_all(id)
            elif level is not None and level in header.levels:
                self._drop(_LATENT_KEY.pack(id, level))
                self._change(header_key, encode_header(left), len(record))

    def headers(self) -> Iterator[Header]:
        self.flush()
        start = b""
        while chunk := self._header_records(start):
            for key, record in chunk:
                (id,) = _HEADER_KEY.unpack(key)
                try:
                    yield decode_header(record, id)
                except DamagedRecordError:
                    with self._changed:
                        if self._read(key) == record:
                            self.remove(id)
            start = chunk[-1][0] + b"\0"

    def count(self) -> int:
        """Of those on the disk."""
        with self._mapped:
            try:
                with self._opened().begin() as transaction:
                    return int(transaction.stat(self._tables[_HEADER_KEY.size])["entries"])
            except lmdb.Error as error:
                raise self._failed(error) from error

    def flush(self) -> None:
        """Waits until all that was put and removed is on the disk. Raises StoreError if it could not be written."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._fault is not None or not (self._pending or self._writing))
            self._hurry = False
            self._raise_fault()

    def close(self) -> None:
        """Writes what waits, for 5 s at most, and gives the folder up. What a fault keeps from the disk is lost."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_SLOW_DISK_S)
        if self._thread.is_alive():
            return  # the disk hangs: the folder is this process's to its end
        with self._mapped:
            self._close()
            if self._owner is not None:
                os.close(self._owner)
                self._owner = None

    # -- the table in memory, under _changed

    def _change(self, key: bytes, record: bytes | None, old_length: int) -> None:
        """`old_length`: of the record under that key so far, 0 for none."""
        replaced = self._pending.get(key)
        self._pending_bytes += len(record or b"") - len(replaced or b"")
        self._pending_pages -= _stored_bytes(len(key), old_length) if old_length else 0
        self._pending_pages += _stored_bytes(len(key), len(record)) if record is not None else 0
        self._pending[key] = record
        self._changed.notify_all()

    def _drop(self, key: bytes) -> None:
        record = self._read(key)
        if record is not None:
            self._change(key, None, len(record))

    def _remove_all(self, id: int) -> None:
        """The entry and every latent under its id, whatever its header says of them."""
        header_key = _HEADER_KEY.pack(id)
        keys = {key for changes in (self._pending, self._writing) for key in changes if key.startswith(header_key)}
        for key in keys | self._keys_of(id) | {header_key}:
            self._drop(key)

    def _raise_fault(self) -> None:
        """While the last transaction could not be written; the thread tries again."""
        if self._fault is not None:
            raise type(self._fault)(*self._fault.args)

    # -- reading

    def _read(self, key: bytes) -> bytes | None:
        with self._changed:
            for changes in (self._pending, self._writing):
                if key in changes:
                    return changes[key]
        with self._mapped:
            try:
                with self._opened().begin(db=self._tables[len(key)], buffers=True) as transaction:
                    found = transaction.get(key)
                    return None if found is None else bytes(found)
            except lmdb.Error as error:
                raise self._failed(error) from error

    def _header_records(self, start: bytes) -> list[tuple[bytes, bytes]]:
        """The next committed headers, from the key `start` on."""
        found: list[tuple[bytes, bytes]] = []
        with self._mapped:
            try:
                with self._opened().begin(db=self._tables[_HEADER_KEY.size]) as transaction:
                    cursor = transaction.cursor()
                    more = cursor.set_range(start)
                    while more and len(found) < _CHUNK:
                        found.append(cursor.item())
                        more = cursor.next()
            except lmdb.Error as error:
                raise self._failed(error) from error
        return found

    def _keys_of(self, id: int) -> set[bytes]:
        """Keys of the committed latents of an entry."""
        prefix = _HEADER_KEY.pack(id)
        found = set()
        with self._mapped:
            try:
                with self._opened().begin(db=self._tables[_LATENT_KEY.size]) as transaction:
                    cursor = transaction.cursor()
                    more = cursor.set_range(prefix)
                    while more and cursor.key().startswith(prefix):
                        found.add(cursor.key())
                        more = cursor.next()
            except lmdb.Error as error:
                raise self._failed(error) from error
        return found

    # -- writing, in the thread

    def _commit_all(self) -> None:
        while self._take():
            try:
                self._commit(self._writing)
                fault, pages = None, self._pages_in_use()
            except StoreError as error:
                fault, pages = error, 0
            with self._changed:
                self._fault = fault
                if fault is None:
                    self._pages = pages
                else:  # what came later wins over what could not be written
                    self._pending = self._writing | self._pending
                    self._pending_bytes = sum(len(record or b"") for record in self._pending.values())
                    self._pending_pages += self._writing_pages
                self._writing, self._writing_pages = {}, 0
                self._changed.notify_all()
                if fault is not None:
                    if self._closing:
                        return
                    self._changed.wait_for(lambda: self._closing, timeout=_RETRY_S)

    def _take(self) -> bool:
        """Moves what has gathered to _writing; False: closing, and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closing)
            self._changed.wait_for(lambda: self._hurry or self._closing, timeout=_GATHER_S)
            self._writing, self._pending, self._pending_bytes = self._pending, {}, 0
            self._writing_pages, self._pending_pages = self._pending_pages, 0
            return bool(self._writing)

    def _commit(self, changes: _Changes) -> None:
        removed: _Changes = {key: None for key, record in changes.items() if record is None}
        try:
            try:
                self._write(changes)
            except lmdb.MapFullError:
                # Pages freed by a transaction can be used by the second one after it.
                self._write(removed)
                self._write({})
                self._write({})
                self._write(changes)
        except lmdb.MapFullError as error:
            raise StoreFullError(f"full: {self._folder} has no room left within {self._budget} bytes") from error
        except lmdb.Error as error:
            with self._mapped:
                self._close()  # some errors leave an environment that refuses everything
            raise StoreError(f"{self._folder}: {error}") from error

    def _write(self, changes: _Changes) -> None:
        with self._transacting:
            with self._mapped:
                environment = self._opened()
            with environment.begin(write=True) as transaction:
                transaction.put(b"commits", os.urandom(8))  # an empty transaction would not count as one
                for key, record in changes.items():
                    if record is None:
                        transaction.delete(key, db=self._tables[len(key)])
                    else:
                        transaction.put(key, record, db=self._tables[len(key)])

    def _pages_in_use(self) -> int:
        with self._mapped:
            return self._count_pages(self._opened())

    # -- the environment, under _mapped

    def _opened(self) -> lmdb.Environment:
        if self._broken and self._transacting.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._transacting.release()
        if self._environment is None:
            try:
                self._own()
                self._environment = self._opened_anew()
                self._tables = {
                    _HEADER_KEY.size: self._environment.open_db(b"headers"),
                    _LATENT_KEY.size: self._environment.open_db(b"latents"),
                }
            except (OSError, lmdb.Error) as error:
                self._close()
                raise StoreError(f"cache folder {self._folder}: {error}") from error
            self._pages = self._count_pages(self._environment)
        return self._environment

    def _opened_anew(self) -> lmdb.Environment:
        file = self._folder / "data.mdb"
        # Removing takes pages too, before it frees any: room for that above the budget, and above a file beyond it.
        size = max(self._budget, file.stat().st_size if file.exists() else 0) + self._budget // 16 + (8 << 20)
        size -= size % _PAGE
        try:
            return lmdb.open(str(self._folder), map_size=size, max_dbs=2, readahead=False)
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError):
            # The file itself is no database: kept aside, never deleted, and begun anew.
            self.damaged += 1
            file.replace(self._folder / "data.mdb.damaged")
            return lmdb.open(str(self._folder), map_size=size, max_dbs=2, readahead=False)

    def _own(self) -> None:
        """Locks the folder for this process; the lock ends with it, however it ends."""
        if self._owner is not None:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts lie in it
        owner = os.open(self._folder / "owner", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(owner)
            raise StoreError(f"cache folder {self._folder} is in use by another process") from None
        self._owner = owner

    def _close(self) -> None:
        if self._environment is not None:
            self._environment.close()
        self._environment, self._broken = None, False

    def _failed(self, error: lmdb.Error) -> StoreError:
        self._broken = True
        return StoreError(f"{self._folder}: {error}")

    def _count_pages(self, environment: lmdb.Environment) -> int:
        with environment.begin() as transaction:
            found = [transaction.stat(table) for table in self._tables.values()]
        return _PAGE * sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in found)


def _stored_bytes(key_length: int, length: int) -> int:
    """What LMDB takes for a record: whole pages for a long one, and its node in the tree."""
    node = key_length + 10  # 8 bytes of head, 2 of index
    if key_length + length <= _LEAF_NODE:
        return _in_tree(node + length)
    return _in_tree(node + 8) + (_PAGE_HEAD + length + _PAGE - 1) // _PAGE * _PAGE


def _in_tree(node: int) -> int:
    """Pages of a B-tree whose keys come in random order are ln 2 full on average (Yao, 1978)."""
    return round(node / math.log(2))
