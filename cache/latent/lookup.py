"""The approximate cache: half-denoised latents of earlier prompts, found by similarity (NIRVANA, arXiv 2312.04429).

A lookup embeds nothing and draws nothing: it compares embeddings within one key space, asks the policy how deep each
neighbour may be entered, and reads the latents that save most. Whatever fails in the store is a miss.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from cache.latent.catalogue import Catalogue, Entry, Gone, Space, Tenant, Vector
from cache.latent.eviction import EVICTORS, Evictor
from cache.latent.figures import Stats
from cache.latent.index import SnapshotError
from cache.latent.keys import Header, KeySpace, random_id
from cache.latent.policy import Policy, entry
from cache.latent.predictor import MatchPredictor
from cache.latent.store import SharedStore, Store, StoreError, StoreFullError
from cache.latent.writer import Insert, Writer

_log = logging.getLogger(__name__)

_BATCH = 1024  # headers entered at a time when the catalogue is built
_RETRY_S = 1.0  # for which lookups leave a store alone that has failed
_LOOK_S = 0.25  # between two looks at what the store takes, and at what other servers did
_LOG_EVERY_S = 60.0
_SAVE_S = 600.0  # between two looks at which graphs are worth saving again
_SAVE_LEAST = 0.05  # of a graph has to have changed, for that
_PURGE_WAIT_S = 5.0


class Found(NamedTuple):
    """A latent to start from, re-noised to where the plan is entered."""

    id: int
    latent: NDArray[np.float16]  # [C, h, w]
    alpha: float
    row: int  # of the plan
    similarity: float


class _Option(NamedTuple):
    """A level of a candidate that the plan may enter at `row`."""

    entry: Entry
    alpha: float
    row: int
    similarity: float


@dataclass(slots=True)
class _Faults:
    """Counts what goes wrong and logs it once a minute. From any thread."""

    count: int = 0
    quiet_until: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def report(self, error: Exception) -> None:
        with self.lock:
            self.count += 1
            tell = time.monotonic() >= self.quiet_until
            if tell:
                self.quiet_until = time.monotonic() + _LOG_EVERY_S
        if tell:
            # Only what is not the store's own complaint needs its traceback.
            _log.warning(
                "cache: %s (%d failures so far)",
                error,
                self.count,
                exc_info=None if isinstance(error, StoreError | SnapshotError) else error,
            )


class LatentCache:
    """Safe to use from many threads. Only `flush`, `purge` and `close` wait for a write, with limits.

    budget_bytes: for the latents and headers of all tenants together.
    near: candidates whose similarity is this close to the best one's are as good; chance chooses among them.
    candidates: nearest neighbours looked at.
    queue: inserts that may wait to be written.
    ttl_s: tenant -> seconds that its entries live; tenants that are not in it keep theirs until they are evicted.
    clock: seconds since the epoch.
    seed: what chance depends on besides each lookup's own seed; None: secret, so that no client can tell the choice.
    predictor: makes a MatchPredictor for a key space; without one, no lookup is skipped.
    snapshots: folder that is this cache's alone as soon as the store is, where large indexes keep their graphs.
    progress: called now and then, while the catalogue is built from the store, with the number of entries that were
        read and that of all.
    """

    def __init__(
        self,
        store: Store,
        budget_bytes: int,
        policy: Policy,
        evictor: str = "lcbfu",
        *,
        near: float = 0.01,
        candidates: int = 16,
        queue: int = 256,
        ttl_s: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.time,
        seed: int | None = None,
        predictor: Callable[[], MatchPredictor | None] = lambda: None,
        snapshots: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.policy = policy
        self._store = store
        self._budget_bytes = budget_bytes
        self._near = near
        self._candidates = candidates
        self._clock = clock
        self._seed = secrets.randbits(64) if seed is None else seed
        self._faults = _Faults()
        self._store_rests_until = 0.0
        self._closed = False
        self._changing = threading.Lock()  # held while the catalogue is changed, never while the store is at work
        levels = cast(Evictor[tuple[int, float]], EVICTORS[evictor]())
        # Plans have few alphas, and entries many levels: what each is worth is worked out once.
        worth = lru_cache(maxsize=4096)(policy.steps)
        self._catalogue = Catalogue(levels, worth, ttl_s or {}, predictor, snapshots, self._faults.report)
        self._writer = Writer(self._write, self._forget, self._keep_up, self._faults.report, queue)
        # A store that several servers use tells what the others do.
        self._shared = cast(SharedStore, store) if hasattr(store, "changes") else None
        self._cursor: str | None = None
        self._looks_at = 0.0
        self._saves_at = time.monotonic() + _SAVE_S
        self._loaded = False
        try:
            self._load(progress)
        except StoreError as error:
            self._faults.report(error)
        self._writer.start()

    # -- lookups

    def find(
        self, space: KeySpace, embedding: Vector, family: str, rows: Sequence[float], count: int, rng_seed: int
    ) -> list[Found | None]:
        """A start for each of `count` pictures of one prompt, different ones as far as there are; None: from scratch.

        embedding: [D], unit norm. family: of the sampler, as the policy names it. rows: alpha of each row of the
        request's plan, ascending; a start lets the picture enter at row 1 or later, whose alpha is not above its own.
        rng_seed: what the choice among near-equal candidates depends on.
        """
        figures = self._catalogue.tenant(space.tenant).figures
        if self._closed or time.monotonic() < self._store_rests_until:
            figures.count("error", count)
            return [None] * count
        held = self._catalogue.space(space, len(embedding))
        if held is None:
            figures.count("miss", count)
            return [None] * count
        if held.predictor is not None and not held.predictor.may_match(embedding):
            figures.count("skipped", count)
            return [None] * count
        try:
            found = self._fetch(self._options(held, embedding, family, rows, rng_seed), count)
        except StoreError as error:
            self._faults.report(error)
            self._store_rests_until = time.monotonic() + _RETRY_S
            figures.count("error", count)
            return [None] * count
        if not found:
            figures.count("miss", count)
            return [None] * count
        if held.predictor is not None:
            held.predictor.matched(embedding)
        starts = [found[picture % len(found)] for picture in range(count)]
        for start in starts:
            self._catalogue.hit(start.id, start.alpha)
            figures.hit(round(self.policy.steps(start.alpha)), start.row)
        return list(starts)

    def _options(
        self, space: Space, embedding: Vector, family: str, rows: Sequence[float], rng_seed: int
    ) -> list[_Option]:
        """What may be started from, the best first: most rows saved, then most similar, near-equal ones shuffled."""
        options = []
        fresh = self.policy.fresh.get(family, 0.0)
        for candidate, similarity in self._catalogue.nearest(space, embedding, self._candidates, self._clock()):
            deepest = self.policy.deepest(family, similarity)
            start = None if deepest is None else entry(candidate.levels, rows, deepest, fresh)
            if start is not None:
                options.append(_Option(candidate, *start, similarity))
        options.sort(key=lambda option: (-option.row, -option.similarity))
        near = sum(
            option.row == options[0].row and option.similarity >= options[0].similarity - self._near
            for option in options
        )
        order = np.random.default_rng((self._seed, rng_seed)).permutation(near)
        return [options[i] for i in order] + options[near:]

    def _fetch(self, options: Sequence[_Option], count: int) -> list[Found]:
        """Up to `count` starts that save as many rows as the first one that the store still has."""
        found: list[Found] = []
        row = 0
        for option in options:
            if len(found) == count or (found and option.row < row):
                break
            latent = self._store.get(option.entry.id, option.alpha)
            if latent is None:
                option.entry.space.tenant.figures.count("lost")
                self._writer.remove([(option.entry.id, option.alpha)])
                continue
            row = option.row
            found.append(Found(option.entry.id, latent, option.alpha, row, option.similarity))
        return found

    # -- inserts

    def insert(
        self, space: KeySpace, prompt: str, embedding: Vector, latents: Mapping[float, NDArray[np.float16]]
    ) -> bool:
        """Queues an entry, which replaces an earlier one of the prompt; False: the queue is full, and it is dropped.

        embedding: [D], unit norm. latents: alpha -> [C, h, w]; the arrays are the cache's from here on.
        """
        if self._writer.insert(Insert(space, prompt, embedding, latents)):
            return True
        self._catalogue.tenant(space.tenant).figures.count("dropped")
        return False

    def _write(self, insert: Insert) -> None:
        figures = self._catalogue.tenant(insert.space.tenant).figures
        latents = {
            alpha: latent
            for alpha, latent in sorted(insert.latents.items())
            if latent.shape == insert.space.shape and np.isfinite(latent).all()
        }
        size = sum(latent.nbytes for latent in latents.values()) + insert.embedding.nbytes
        if insert.cancelled or not latents or size > self._budget_bytes:
            figures.count("dropped")
            return
        levels = tuple(latents)
        header = Header(
            random_id(), insert.space, insert.prompt, insert.embedding, self._clock(), levels, (0,) * len(levels)
        )
        try:
            header = self._put(header, list(latents.values()), size)
        except StoreError:
            figures.count("dropped")
            raise
        with self._changing:
            gone = [(header.id, None)] if insert.cancelled else self._catalogue.add([header])
        figures.count("dropped" if insert.cancelled else "stored")
        self._erase(gone)
        self._make_room(0)

    def _put(self, header: Header, latents: Sequence[NDArray[np.float16]], size: int) -> Header:
        self._make_room(size)
        try:
            return self._store.put(header, latents)
        except StoreFullError:
            # The store took more for an entry than was thought, or has less room than the budget: Redis its own limit,
            # LMDB pages that are free but apart. Each entry that does not fit makes more of it, until one does.
            self._make_room(2 * size)
            self._evict(2 * size)
            return self._store.put(header, latents)

    def _make_room(self, size: int) -> None:
        """Evicts levels until `size` more bytes fit into the budget, or nothing is left."""
        while (excess := self._store.used_bytes + size - self._budget_bytes) > 0:
            if not self._evict(excess):
                return

    def _evict(self, size: int) -> bool:
        """Evicts levels of this size at least; False: there are none."""
        with self._changing:
            gone = self._catalogue.evict(size)
        self._erase(gone)
        return bool(gone)

    def _erase(self, gone: Sequence[Gone]) -> None:
        """Removes from the store what has left the catalogue; what fails is tried again later."""
        for i, (id, level) in enumerate(gone):
            try:
                self._store.remove(id, level)
            except StoreError:
                self._writer.remove(gone[i:])
                raise

    def _forget(self, gone: Gone) -> None:
        with self._changing:
            self._catalogue.remove(*gone)
        self._store.remove(*gone)

    # -- keeping in step with the store

    def _keep_up(self) -> None:
        if not self._loaded:
            self._load(None)
        elif time.monotonic() >= self._looks_at:
            self._looks_at = time.monotonic() + _LOOK_S
            if self._shared is not None:
                self._follow(self._shared)
            self._make_room(0)  # what was written may have turned out larger than it was taken for
            if time.monotonic() >= self._saves_at:
                self._saves_at = time.monotonic() + _SAVE_S
                self._save(_SAVE_LEAST)
        with self._changing:
            gone = self._catalogue.expire(self._clock())
        self._erase(gone)

    def _load(self, progress: Callable[[int, int], None] | None) -> None:
        """Enters what the store has and forgets what it has not."""
        self._loaded = False
        if self._shared is not None:
            self._cursor = self._shared.changes(None).cursor
        missing = set(self._catalogue.levels())
        total = self._store.count()
        headers = self._store.headers()
        read = 0
        with self._catalogue.filling():
            while batch := list(islice(headers, _BATCH)):
                missing.difference_update((header.id, level) for header in batch for level in header.levels)
                with self._changing:
                    gone = self._catalogue.add(batch)
                self._erase(gone)
                read += len(batch)
                if progress is not None:
                    progress(read, total)
        with self._changing:
            for id, level in missing:
                self._catalogue.remove(id, level)
        self._make_room(0)
        self._loaded = True

    def _save(self, least: float) -> None:
        try:
            self._catalogue.save(least)
        except OSError as error:
            self._faults.report(StoreError(f"an index was not saved: {error}"))

    def _follow(self, store: SharedStore) -> None:
        """Takes over what other servers have put and removed."""
        changes = store.changes(self._cursor)
        if not changes.complete:
            self._load(None)
            return
        gone: list[Gone] = []
        with self._changing:
            for change in changes.events:
                if change.header is None:
                    self._catalogue.remove(change.id, change.level)
                else:
                    gone += self._catalogue.add([change.header])
        self._cursor = changes.cursor
        self._erase(gone)

    # -- for the tenant

    def stats(self, tenant: str) -> Stats:
        """This tenant's figures, of its own entries and lookups alone."""
        return _stats(self._catalogue.tenant(tenant))

    def purge(self, tenant: str, prompt: str | None = None) -> int:
        """Forgets a tenant's entries, of one prompt or all, and inserts that still wait; returns the number of entries.

        They are found no more at once. Waits up to 5 s for the store to forget them; a store that fails is asked again
        until it does, while this process lives.
        """
        with self._changing:
            self._writer.cancel(tenant, prompt)
            gone = self._catalogue.purge(tenant, prompt, self._clock())
        self._writer.remove(gone)
        if gone:
            self._writer.flush(_PURGE_WAIT_S)
        return len(gone)

    # -- for the service

    def totals(self) -> Stats:
        """All tenants' figures together, for the operator."""
        return Stats.total(_stats(tenant) for tenant in self._catalogue.tenants())

    @property
    def errors(self) -> int:
        """Failures of the store since the start."""
        return self._faults.count

    @property
    def damaged(self) -> int:
        """Entries that the store found damaged since the start, and removed."""
        return self._store.damaged

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything inserted so far is written or dropped; False if it was not in time."""
        return self._writer.flush(timeout_s)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Writes what waits and closes the store; False if the store did not answer in time, and was left open."""
        self._closed = True
        finished = self._writer.close(timeout_s)
        self._catalogue.close()
        if finished:
            if self._loaded:  # else the store, and with it the folder of the snapshots, may be another's
                self._save(0.0)
            self._loaded = False
            self._store.close()
        return finished


def _stats(tenant: Tenant) -> Stats:
    return tenant.figures.stats(sum(len(space.entries) for space in list(tenant.spaces.values())), tenant.bytes)
