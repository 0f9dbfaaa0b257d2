"""What the store holds, in memory: for each tenant its key spaces, and in each an index of its entries.

A tenant's lookups, figures and purges read that tenant's record only, so neither their result nor the work that they do
depends on anyone else's entries. The byte budget alone is shared.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.latent.eviction import Evictor
from cache.latent.figures import Figures
from cache.latent.index import Index, SnapshotError
from cache.latent.keys import Header, KeySpace
from cache.latent.predictor import MatchPredictor

Vector = NDArray[np.float32]
_PURGES = 1000  # that a tenant's record remembers
Gone = tuple[int, float | None]  # (id, level) that the store should forget; level None: the whole entry


@dataclass(slots=True)
class Entry:
    """levels: alpha -> bytes in the store, ascending; replaced, never changed, so that reading it needs no lock."""

    id: int
    space: Space
    prompt: str
    created: float
    levels: Mapping[float, int]


@dataclass(slots=True, eq=False)
class Space:
    tenant: Tenant
    key: KeySpace
    index: Index
    predictor: MatchPredictor | None
    entries: dict[int, Entry] = field(default_factory=dict)
    by_prompt: dict[str, Entry] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Tenant:
    """Spaces are kept by embedding width too: another embedder's vectors cannot be compared."""

    ttl_s: float | None
    spaces: dict[tuple[KeySpace, int], Space] = field(default_factory=dict)
    by_age: list[tuple[float, int]] = field(default_factory=list)  # heap of (created, id), where there is a TTL
    bytes: int = 0
    figures: Figures = field(default_factory=Figures)
    purged: dict[str | None, float] = field(default_factory=dict)  # prompt, or None for all -> when, the latest last

    def has_purged(self, header: Header) -> bool:
        """An entry that only now comes to be known, from a store that was out of reach or from another server."""
        return header.created < max(self.purged.get(None, -np.inf), self.purged.get(header.prompt, -np.inf))


class Catalogue:
    """Looked up from any thread; changed by one at a time, which the caller sees to.

    worth: what a level of a given alpha is worth to the evictor. predictor: makes one for a key space.
    snapshots: folder of the graphs that large indexes save; None: they save none. refused: told why one is not used.
    """

    def __init__(
        self,
        evictor: Evictor[tuple[int, float]],
        worth: Callable[[float], float],
        ttl_s: Mapping[str, float],
        predictor: Callable[[], MatchPredictor | None],
        snapshots: Path | None = None,
        refused: Callable[[SnapshotError], None] = lambda error: None,
    ) -> None:
        self._evictor = evictor
        self._evictor_lock = threading.Lock()  # lookups report hits while others change it
        self._worth = worth
        self._ttl_s = ttl_s
        self._predictor = predictor
        self._snapshots = snapshots
        self._refused = refused
        self._filling: ExitStack | None = None
        self._tenants: dict[str, Tenant] = {}
        self._entries: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def levels(self) -> list[tuple[int, float]]:
        """All levels of all entries."""
        return [(entry.id, level) for entry in list(self._entries.values()) for level in entry.levels]

    # -- reading: any thread

    def space(self, key: KeySpace, width: int) -> Space | None:
        """The entries of a key space whose embeddings have this width; None: there are none."""
        return self.tenant(key.tenant).spaces.get((key, width))

    def nearest(self, space: Space, embedding: Vector, k: int, now: float) -> list[tuple[Entry, float]]:
        """The k entries of a key space most similar to embedding [D], best first; expired ones left out."""
        ids, similarities = space.index.search(embedding, k)
        oldest = -np.inf if space.tenant.ttl_s is None else now - space.tenant.ttl_s
        found = []
        for id, similarity in zip(ids.tolist(), similarities.tolist(), strict=True):
            entry = space.entries.get(id)
            if entry is not None and entry.created >= oldest:
                found.append((entry, similarity))
        return found

    def hit(self, id: int, level: float) -> None:
        """A level was used. One that went meanwhile is passed over."""
        with self._evictor_lock:
            self._evictor.hit((id, level))

    def tenant(self, name: str) -> Tenant:
        """This tenant's record, made at the first call for it: only tenants that exist may be asked for."""
        return self._tenants.get(name) or self._tenants.setdefault(name, Tenant(self._ttl_s.get(name)))

    def tenants(self) -> list[Tenant]:
        return list(self._tenants.values())

    # -- changing: one caller at a time

    def add(self, headers: Iterable[Header]) -> list[Gone]:
        """Enters entries, each in place of an older one of its prompt; returns what they replaced.

        An entry that is known is passed over; one that is older than its prompt's, or than a purge, is returned too.
        """
        gone: list[Gone] = []
        vectors: dict[int, tuple[Space, list[Entry], list[Vector]]] = {}
        for header in headers:
            if header.id in self._entries:
                continue
            if self.tenant(header.space.tenant).has_purged(header):
                gone.append((header.id, None))
                continue
            space = self._space_for(header.space, len(header.embedding))
            older = space.by_prompt.get(header.prompt)
            # Servers that share a store have to agree on which of two goes, hence the id.
            if older is not None and (older.created, older.id) > (header.created, header.id):
                gone.append((header.id, None))
                continue
            entry = self._enter(header, space)
            if older is not None:
                self._drop(older)
                gone.append((older.id, None))
            _, entries, embeddings = vectors.setdefault(id(space), (space, [], []))
            entries.append(entry)
            embeddings.append(header.embedding)
        for space, entries, embeddings in vectors.values():
            # One of the batch may have been replaced by a later one of the batch.
            kept = [i for i, entry in enumerate(entries) if entry.id in space.entries]
            if kept:
                ids = np.array([entries[i].id for i in kept], dtype=np.int64)
                space.index.add(ids, np.stack([embeddings[i] for i in kept]))
        return gone

    def remove(self, id: int, level: float | None) -> bool:
        """Forgets a level, and the entry with its last; False if it was not there."""
        entry = self._entries.get(id)
        if entry is None or (level is not None and level not in entry.levels):
            return False
        if level is None or len(entry.levels) == 1:
            self._drop(entry)
            return True
        with self._evictor_lock:
            self._evictor.remove((id, level))
            entry.space.tenant.bytes -= entry.levels[level]
            entry.levels = {alpha: size for alpha, size in entry.levels.items() if alpha != level}
        return True

    def evict(self, size: int) -> list[Gone]:
        """Forgets the levels that the evictor gives up for `size` bytes; returns them."""
        with self._evictor_lock:
            victims = self._evictor.victims(size)
        gone: list[Gone] = []
        for id, level in victims:
            entry = self._entries[id]
            entry.space.tenant.figures.count("evicted")
            gone.append((id, None if len(entry.levels) == 1 else level))
            self.remove(id, level)
        return gone

    def expire(self, now: float) -> list[Gone]:
        """Forgets entries older than their tenant's TTL; returns them."""
        gone: list[Gone] = []
        for tenant in list(self._tenants.values()):
            if tenant.ttl_s is None:
                continue
            while tenant.by_age and tenant.by_age[0][0] < now - tenant.ttl_s:
                entry = self._entries.get(heapq.heappop(tenant.by_age)[1])
                if entry is not None:
                    tenant.figures.count("expired", len(entry.levels))
                    self._drop(entry)
                    gone.append((entry.id, None))
        return gone

    def purge(self, name: str, prompt: str | None, now: float) -> list[Gone]:
        """Forgets a tenant's entries, of one prompt or all, and those of before that are yet to come; returns them."""
        tenant = self.tenant(name)
        tenant.purged.pop(prompt, None)
        tenant.purged[prompt] = now
        if len(tenant.purged) > _PURGES:
            del tenant.purged[next(iter(tenant.purged))]
        spaces = list(tenant.spaces.values())
        if prompt is None:
            doomed = [entry for space in spaces for entry in space.entries.values()]
        else:
            doomed = [space.by_prompt[prompt] for space in spaces if prompt in space.by_prompt]
        for entry in doomed:
            self._drop(entry)
        return [(entry.id, None) for entry in doomed]

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Much is added in this block: the indexes that it makes begin their graphs at its end."""
        with ExitStack() as stack:
            self._filling = stack
            try:
                yield
            finally:
                self._filling = None

    def save(self, least: float) -> None:
        """Saves the graphs of which more than this share has changed, and drops those that are of no use any more.

        Raises OSError.
        """
        if self._snapshots is None:
            return
        spaces = self._spaces()
        for space in spaces:
            space.index.save(least)
        used = {_file_of(space.key, space.index.dimension) for space in spaces}
        for path in list(self._snapshots.glob("*")):
            if path.name not in used:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends what its indexes do in the background."""
        for space in self._spaces():
            space.index.close()

    def _spaces(self) -> list[Space]:
        return [space for tenant in self.tenants() for space in list(tenant.spaces.values())]

    def _space_for(self, key: KeySpace, width: int) -> Space:
        tenant = self.tenant(key.tenant)
        space = tenant.spaces.get((key, width))
        if space is None:
            snapshot = None if self._snapshots is None else self._snapshots / _file_of(key, width)
            index = Index(width, snapshot=snapshot, refused=self._refused)
            if self._filling is not None:
                self._filling.enter_context(index.filling())
            space = tenant.spaces[key, width] = Space(tenant, key, index, self._predictor())
        return space

    def _enter(self, header: Header, space: Space) -> Entry:
        levels = dict(zip(header.levels, header.sizes, strict=True))
        entry = Entry(header.id, space, header.prompt, header.created, levels)
        space.entries[entry.id] = space.by_prompt[entry.prompt] = entry
        if space.tenant.ttl_s is not None:
            heapq.heappush(space.tenant.by_age, (entry.created, entry.id))
        with self._evictor_lock:
            self._entries[entry.id] = entry
            for level, size in levels.items():
                self._evictor.add((entry.id, level), size, self._worth(level))
            space.tenant.bytes += sum(levels.values())
        return entry

    def _drop(self, entry: Entry) -> None:
        space = entry.space
        with self._evictor_lock:
            del self._entries[entry.id]
            for level in entry.levels:
                self._evictor.remove((entry.id, level))
            entry.space.tenant.bytes -= sum(entry.levels.values())
        del space.entries[entry.id]
        if space.by_prompt[entry.prompt] is entry:  # else its successor's
            del space.by_prompt[entry.prompt]
        if space.entries:
            space.index.remove(np.array([entry.id], dtype=np.int64))
        else:
            del space.tenant.spaces[space.key, space.index.dimension]
            with suppress(OSError):  # the next `save` tries again
                space.index.discard()


def _file_of(key: KeySpace, width: int) -> str:
    return f"{key.digest.hex()}-{width}"
