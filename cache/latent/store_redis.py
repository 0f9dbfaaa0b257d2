"""Latents in a Redis server (7 or later) that several servers share, and the log by which they follow each other.

Keys, all below one prefix:

    header:ID          the header's record; expires
    latent:ID:ALPHA    a latent's record; expires
    levels             hash: ID -> "header=BYTES ALPHA=BYTES ...", the levels that are left and what they take
    expiry             sorted set: ID by the time when it expires, for those that do
    bytes              what all entries take
    log                stream of "put ID SERVER" and "gone ID ALPHA|* SERVER"

An entry changes in one script, so that it is there whole or not at all, and in one round trip. Redis drops what has
expired by itself; the next script that puts something takes it off the books.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cache.latent.codec import DamagedRecordError, decode_header, decode_latent, encode_header
from cache.latent.keys import Header
from cache.latent.store import Change, Changes, Latent, StoreError, StoreFullError, records_of, with_sizes

_TIMEOUT_S = 0.1  # to connect, and for an answer: together what a request may wait
_SCAN = 256  # headers asked for at a time
_EVENTS = 1000
_LOG_LENGTH = 100_000
_ENTRY_BYTES = 300  # an entry's places in `levels` and `expiry`

_DROP = """
local prefix = KEYS[1]
local function drop(id, alpha, server)
  local levels = redis.call('HGET', prefix .. 'levels', id)
  if not levels then return end
  local left, freed, count = '', 0, 0
  for name, bytes in string.gmatch(levels, '(%S+)=(%d+)') do
    if name == alpha then
      freed = tonumber(bytes)
    else
      left = left .. name .. '=' .. bytes .. ' '
      count = count + 1
    end
  end
  if alpha ~= '*' and freed == 0 then return end
  if alpha ~= '*' and count > 1 then
    redis.call('UNLINK', prefix .. 'latent:' .. id .. ':' .. alpha)
    redis.call('HSET', prefix .. 'levels', id, left)
  else
    alpha, freed = '*', 0
    for name, bytes in string.gmatch(levels, '(%S+)=(%d+)') do
      redis.call('UNLINK', prefix .. 'latent:' .. id .. ':' .. name)
      freed = freed + tonumber(bytes)
    end
    redis.call('UNLINK', prefix .. 'header:' .. id)
    redis.call('HDEL', prefix .. 'levels', id)
    redis.call('ZREM', prefix .. 'expiry', id)
  end
  redis.call('DECRBY', prefix .. 'bytes', freed)
  redis.call('XADD', prefix .. 'log', 'MAXLEN', '~', ARGV[1], '*', 'e', 'gone ' .. id .. ' ' .. alpha .. ' ' .. server)
end
"""

# ARGV: log length, server, id, alpha or *. Allowed when Redis has no memory left: it frees some.
_REMOVE = "#!lua flags=allow-oom\n" + _DROP + "drop(ARGV[3], ARGV[4], ARGV[2])"

# ARGV: log length, server, id, now, expiry or '', levels, header, then alpha and record of each level.
_PUT = (
    "#!lua\n"
    + _DROP
    + """
for _, id in ipairs(redis.call('ZRANGE', prefix .. 'expiry', '-inf', ARGV[4], 'BYSCORE', 'LIMIT', 0, 100)) do
  drop(id, '*', '')
end
local id, expiry = ARGV[3], ARGV[5]
drop(id, '*', '')
local function keep(key, value)
  if expiry == '' then
    redis.call('SET', key, value)
  else
    redis.call('SET', key, value, 'PXAT', expiry)
  end
end
local total = 0
for bytes in string.gmatch(ARGV[6], '=(%d+)') do total = total + tonumber(bytes) end
keep(prefix .. 'header:' .. id, ARGV[7])
for i = 8, #ARGV, 2 do keep(prefix .. 'latent:' .. id .. ':' .. ARGV[i], ARGV[i + 1]) end
redis.call('HSET', prefix .. 'levels', id, ARGV[6])
if expiry ~= '' then redis.call('ZADD', prefix .. 'expiry', expiry, id) end
redis.call('INCRBY', prefix .. 'bytes', total)
redis.call('XADD', prefix .. 'log', 'MAXLEN', '~', ARGV[1], '*', 'e', 'put ' .. id .. ' ' .. ARGV[2])
"""
)


class RedisStore:
    """url: as redis-py reads it; ValueError if it cannot. name: of this part of the Redis server, "model@revision".

    ttl_s: tenant -> seconds after which its entries expire; those of other tenants stay until they are removed.
    log_length: events that the log remembers, about.

    Connects when a call needs it. A call waits 0.1 s for a connection and 0.1 s for an answer, and is not repeated.
    """

    def __init__(
        self, url: str, name: str, *, ttl_s: Mapping[str, float] | None = None, log_length: int = _LOG_LENGTH
    ) -> None:
        self.damaged = 0
        self._prefix = f"headstart:{name}:"
        self._ttl_s = ttl_s or {}
        self._log_length = log_length
        self._server = secrets.token_hex(8)  # tells this store's events in the log from those of others
        self._doubtful: deque[int] = deque(maxlen=1000)  # put without an answer: the log will tell if they are there
        self._redis: Any = redis.Redis.from_url(
            url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._put_script = self._redis.register_script(_PUT)
        self._remove_script = self._redis.register_script(_REMOVE)

    @property
    def used_bytes(self) -> int:
        """Memory that Redis takes for all entries, of all servers: sizes of its allocator, to within 1%."""
        with _Faults():
            return int(self._redis.get(self._prefix + "bytes") or 0)

    def put(self, header: Header, latents: Sequence[Latent]) -> Header:
        records = {_text(level): record for level, record in records_of(header, latents).items()}
        sizes = [_stored_bytes(self._latent_key(header.id, level), record) for level, record in records.items()]
        unsized = encode_header(with_sizes(header, sizes, 0))  # as long as with its share, but for some digits
        header_bytes = _ENTRY_BYTES + _stored_bytes(self._header_key(header.id), unsized)
        header = with_sizes(header, sizes, header_bytes)
        ttl = self._ttl_s.get(header.space.tenant)
        levels = [f"{level}={size}" for level, size in zip(records, sizes, strict=True)]
        fields = [part for field in records.items() for part in field]
        arguments = [
            self._log_length,
            self._server,
            header.id,
            round(time.time() * 1000),
            "" if ttl is None else round((header.created + ttl) * 1000),
            " ".join([f"header={header_bytes}", *levels]),
            encode_header(header),
            *fields,
        ]
        try:
            with _Faults():
                self._put_script(keys=[self._prefix], args=arguments)
        except StoreError:
            self._doubtful.append(header.id)
            raise
        return header

    def get(self, id: int, level: float) -> Latent | None:
        with _Faults():
            record = self._redis.get(self._latent_key(id, _text(level)))
        if record is None:
            return None
        try:
            return decode_latent(record, id, level)
        except DamagedRecordError:
            self.damaged += 1
            self.remove(id, level)
            return None

    def remove(self, id: int, level: float | None = None) -> None:
        alpha = "*" if level is None else _text(level)
        with _Faults():
            self._remove_script(keys=[self._prefix], args=[self._log_length, self._server, id, alpha])

    def headers(self) -> Iterator[Header]:
        seen: set[int] = set()
        cursor = 0
        while True:
            with _Faults():
                cursor, found = self._redis.hscan(self._prefix + "levels", cursor, count=_SCAN)
            ids = [int(id) for id in found if int(id) not in seen]  # a scan may meet an entry twice
            seen.update(ids)
            for id, header in self._headers_of(ids).items():
                if header is not None:
                    yield header
                else:
                    self.remove(id)
            if not cursor:
                return

    def count(self) -> int:
        with _Faults():
            return int(self._redis.hlen(self._prefix + "levels"))

    def changes(self, after: str | None) -> Changes:
        log = self._prefix + "log"
        if after is None:
            return Changes(self._now(), (), True)
        with _Faults():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.xrange(log, f"({after}", count=_EVENTS)
            pipeline.xrange(log, after, after)
            found, mark = pipeline.execute()
        if not mark:  # the log was cut after it, or is another one
            return Changes(self._now(), (), False)
        events = [(cursor.decode(), *fields[b"e"].decode().split(" ")) for cursor, fields in found]
        put = [int(id) for _, kind, id, *rest in events if kind == "put" and self._foreign(int(id), rest[-1])]
        headers = self._headers_of(put)
        changes = []
        for _, kind, id, *rest in events:
            if kind == "put" and (header := headers.get(int(id))) is not None:
                changes.append(Change(int(id), None, header))
            elif kind == "gone" and rest[-1] != self._server:
                changes.append(Change(int(id), None if rest[0] == "*" else float(rest[0]), None))
        return Changes(events[-1][0] if events else after, tuple(changes), True)

    def close(self) -> None:
        self._redis.close()

    def _now(self) -> str:
        """The cursor of the last event; a log without one gets one, which tells later whether the log was cut."""
        log = self._prefix + "log"
        with _Faults():
            last = self._redis.xrevrange(log, count=1)
            cursor: bytes = last[0][0] if last else self._redis.xadd(log, {"e": f"start 0 {self._server}"})
        return cursor.decode()

    def _foreign(self, id: int, server: str) -> bool:
        return server != self._server or id in self._doubtful

    def _headers_of(self, ids: Sequence[int]) -> dict[int, Header | None]:
        """Headers with the levels that are left of them; None: expired, or damaged, which is counted."""
        if not ids:
            return {}
        with _Faults():
            pipeline = self._redis.pipeline(transaction=False)  # a transaction is refused when memory is full
            pipeline.hmget(self._prefix + "levels", ids)
            pipeline.mget([self._header_key(id) for id in ids])
            levels, records = pipeline.execute()
        headers: dict[int, Header | None] = {}
        for id, left, record in zip(ids, levels, records, strict=True):
            headers[id] = None
            if left is None or record is None:
                continue
            try:
                headers[id] = _with_levels(decode_header(record, id), left.decode())
            except DamagedRecordError:
                self.damaged += 1
        return headers

    def _header_key(self, id: int) -> str:
        return f"{self._prefix}header:{id}"

    def _latent_key(self, id: int, level: str) -> str:
        return f"{self._prefix}latent:{id}:{level}"


class _Faults:
    """Turns what redis-py raises into StoreError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, redis.exceptions.OutOfMemoryError):
            raise StoreFullError(f"full: {error}") from error
        if isinstance(error, redis.RedisError | OSError):
            raise StoreError(f"Redis: {' '.join(str(error).split())}") from error


def _text(level: float) -> str:
    return repr(float(level))


def _with_levels(header: Header, left: str) -> Header:
    names = {field.partition("=")[0] for field in left.split()}
    kept = [(a, size) for a, size in zip(header.levels, header.sizes, strict=True) if _text(a) in names]
    return replace(header, levels=tuple(a for a, _ in kept), sizes=tuple(size for _, size in kept))


def _stored_bytes(key: str, record: bytes) -> int:
    """Memory of a string: its text and its key's in jemalloc's size classes, the object and its place in the table."""
    text = _size_class(len(record) + (6 if len(record) < 1 << 16 else 10))
    return text + _size_class(len(key) + 4) + 16 + 24


def _size_class(size: int) -> int:
    """jemalloc allocates in classes: four to each doubling, 16 bytes apart at least."""
    step = max(16, 1 << max((size - 1).bit_length() - 3, 0))
    return -(-size // step) * step
