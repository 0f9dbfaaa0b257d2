"""Nearest embeddings by inner product: exact while there are few, an HNSW graph past a set size.

Memory per entry of width D: 4·D bytes while exact; 2·D (float16) plus about 8·M + 20 bytes of graph after that; and
about 150 bytes for ids and rows in both. Tombstones take as much as entries, and during a rebuild the old index and the
fresh one are both in memory.

Removed rows stay in the graph as tombstones: a search asks for more than it needs and drops them. When a quarter of all
rows are tombstones, or when the kind no longer fits the size, a background thread builds a fresh index from the live
rows, replays what has changed meanwhile, and puts it in the old one's place; searches go on all the time.

A graph takes minutes to build and a second to read, so it can be saved. A saved graph is never the index itself: it is
what the next one, filled by its owner, grows its graph from. What the index does not have is dropped from it, and what
it lacks is added, so that a graph of last week is as good as one of now, only slower to bring up to date.
"""

import atexit
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import faiss
import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

Ids: TypeAlias = NDArray[np.int64]
Vectors: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int64]
Journal: TypeAlias = list[tuple[Ids, Rows | None]]  # added with the rows that they got, or (None) removed

# Chosen with bench/cache_lookup.py for a million vectors of width 256 on two cores.
NEIGHBOURS = 16  # M: links of a vector on every upper level of the graph, twice as many on the lowest
BUILD_BEAM = 64  # efConstruction
SEARCH_BEAM = 256  # efSearch

CHUNK = 8  # rows added in one go to a graph in use: a search waits at most for these
FLAT_CHUNK = 1024  # the same without a graph
BUILD_CHUNK = 4096  # rows added in one go to an index not yet in use
WIDEST = 1024  # the most results that a graph or a GPU is asked for to get round tombstones
RETRY_S = 60.0  # between two attempts to rebuild, when one has failed
MAGIC = b"HSINDEX1"
GPU = faiss.get_num_gpus() > 0


class SnapshotError(ValueError):
    """A saved graph is damaged, of another width, or too old to be worth bringing up to date."""


class Index:
    """int64 ids and unit-norm float32 vectors of one width, searched by inner product; safe to use from many threads.

    Up to `exact_limit` vectors the search is exact; past that it is approximate, once the graph is built (`settle`
    waits for that). `build_threads` work on a rebuild. If faiss has a GPU, every search is exact and runs there.

    snapshot: the file of the saved graph; None: there is none, and nothing is saved. An id must stand for the same
        vector whenever it is used with one file.
    refused: told why a saved graph was not used.
    """

    def __init__(
        self,
        dimension: int,
        exact_limit: int = 20_000,
        *,
        build_threads: int = 1,
        snapshot: Path | None = None,
        refused: Callable[[SnapshotError], None] = lambda error: None,
    ) -> None:
        self.dimension = dimension
        self._exact_limit = exact_limit
        self._build_threads = build_threads
        self._snapshot = snapshot
        self._refused = refused
        self._unsaved = 0  # vectors added and removed since the graph was saved
        self._holding = False
        self._lock = _SharedLock()  # shared by searches; exclusive while the index in use is changed
        self._changes = threading.RLock()  # one change, or one snapshot, at a time; searches do not take it
        self._segment = _Segment(dimension, graph=False)
        self._journal: Journal | None = None  # what a rebuild under way has still to take over
        self._worker: threading.Thread | None = None
        self._retry_at = 0.0
        self._closed = False

    def __len__(self) -> int:
        return len(self._segment)

    @property
    def exact(self) -> bool:
        """Whether a search compares with every vector."""
        return not self._segment.graph

    def ids(self) -> Ids:
        """The ids of all vectors, int64 [N], in no particular order."""
        with self._changes:
            return self._segment.live()[0]

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add `vectors` [N, D] under `ids` [N] (at least 0); an id that is there already is replaced."""
        ids = np.array(ids, np.int64)  # a copy: the journal keeps it
        vectors = np.ascontiguousarray(vectors, np.float32)
        if ids.ndim != 1 or vectors.shape != (len(ids), self.dimension):
            raise ValueError(
                f"ids and vectors have shapes {ids.shape} and {vectors.shape}, expected [N] and [N, {self.dimension}]"
            )
        if not np.isfinite(vectors).all():
            raise ValueError("a vector holds a value that is not finite")
        if len(ids) and ids.min() < 0:
            raise ValueError("an id is negative")
        start = 0
        while start < len(ids):
            with self._changes:
                chunk = slice(start, start + (CHUNK if self._segment.graph else FLAT_CHUNK))
                with self._lock.exclusive(), _threads(1):
                    rows = self._segment.add(ids[chunk], vectors[chunk])
                if self._journal is not None:
                    self._journal.append((ids[chunk], rows))
                self._unsaved += len(rows)
                self._rebuild_if_due()
            start = chunk.stop

    def remove(self, ids: Ids) -> int:
        """Remove `ids` [N]; those that are not here are passed over. Returns how many were."""
        ids = np.array(ids, np.int64)
        with self._changes:
            if self._journal is not None:
                self._journal.append((ids, None))
            removed = self._segment.remove(ids)
            self._unsaved += removed
            self._rebuild_if_due()
            return removed

    @contextmanager
    def filling(self) -> Iterator[None]:
        """No rebuild begins in this block: it would begin with a part of what is added, and compete with the rest."""
        self._holding = True
        try:
            yield
        finally:
            with self._changes:
                self._holding = False
                self._rebuild_if_due()

    def search(self, vector: Vectors, k: int) -> tuple[Ids, Vectors]:
        """The ids [k] of the vectors nearest to `vector` [D] and their inner products [k], best first; fewer than k if
        there are fewer, or if the graph finds fewer among many that were removed."""
        query = np.ascontiguousarray(vector, np.float32)
        if query.shape != (self.dimension,):
            raise ValueError(f"the vector has shape {query.shape}, expected [{self.dimension}]")
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        if not np.isfinite(query).all():
            raise ValueError("the vector holds a value that is not finite")
        # An index on a GPU has one scratch memory: one search at a time.
        with self._lock.exclusive() if GPU else self._lock.shared(), _threads(1):
            return self._segment.search(query, k)

    def settle(self, timeout: float | None = None) -> bool:
        """Wait until no rebuild is under way; False if one still is after `timeout` seconds."""
        worker = self._worker
        if worker is not None:
            worker.join(timeout)
        return worker is None or not worker.is_alive()

    def close(self) -> None:
        """Give up a rebuild under way; searches and changes still work, but nothing is rebuilt any more."""
        self._closed = True
        self.settle()

    def save(self, least: float = 0.0) -> None:
        """Save the graph if more than this share of it has changed since; without one, drop what was saved.

        All or nothing, and to the disk when it returns. Searches go on meanwhile, changes wait. Raises OSError.
        """
        path = self._snapshot
        if path is None:
            return
        with self._changes:
            if self._segment.graph:
                if self._unsaved > least * len(self):
                    self._write(path)
                    self._unsaved = 0
            elif len(self) <= self._exact_limit:  # else a graph is to come, from what is saved if that is possible
                path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Close, and drop what was saved. Raises OSError."""
        self.close()
        if self._snapshot is not None:
            self._snapshot.unlink(missing_ok=True)

    def _write(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.tmp")
        try:
            with scratch.open("wb") as file:
                summed = _Summed(file)
                self._segment.write(summed)
                file.write(summed.checksum.to_bytes(4, "little"))
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    def _rebuild_if_due(self) -> None:
        segment = self._segment
        # Half way back before a graph is given up, so that a size about the limit does not swing between the two.
        limit = self._exact_limit // 2 if segment.graph else self._exact_limit
        graph = len(segment) > limit and not GPU
        due = graph != segment.graph or segment.dead > max(CHUNK, segment.count // 4)
        free = self._journal is None and not self._holding and not self._closed
        if due and free and time.monotonic() >= self._retry_at:
            self._journal = []
            self._worker = threading.Thread(
                target=self._rebuild,
                args=(segment, segment.live(), self._unsaved, graph),
                name="index-rebuild",
                daemon=True,
            )
            # A daemon that is still inside faiss when the interpreter goes away would abort the process.
            atexit.register(self.close)
            self._worker.start()

    def _rebuild(self, old: "_Segment", live: tuple[Ids, Rows], unsaved: int, graph: bool) -> None:
        """Put a fresh segment in the place of `old`, whose ids and rows were `live`, and `unsaved` of them not saved,
        when the journal was begun."""
        try:
            with _threads(self._build_threads):
                fresh = self._grown(live[0]) if graph and not old.graph else None
                fresh = fresh or _Segment(self.dimension, graph=graph)
                missing = ~np.isin(live[0], fresh.live()[0])
                changed = int(missing.sum()) + fresh.dead - unsaved
                self._apply([(live[0][missing], live[1][missing])], old, fresh)
                while not self._take_over(old, fresh, changed):
                    pass
        except (MemoryError, RuntimeError) as error:  # faiss reports what it cannot allocate as either
            log.warning("the index was not rebuilt, the old one stays in use: %s", error)
            with self._changes:
                self._retry_at = time.monotonic() + RETRY_S
                self._journal = None
        finally:
            atexit.unregister(self.close)

    def _grown(self, ids: Ids) -> "_Segment | None":
        """The saved graph without what is not among `ids`; None: there is none that is of use."""
        if self._snapshot is None:
            return None
        try:
            segment = _Segment.load(self._snapshot, self.dimension)
            known = segment.live()[0]
            segment.remove(known[~np.isin(known, ids)])
            if segment.dead > segment.count // 4:
                raise SnapshotError(f"{self._snapshot}: of {segment.count} rows, {segment.dead} are of no use any more")
        except FileNotFoundError:
            return None
        except (SnapshotError, OSError) as error:
            self._refused(error if isinstance(error, SnapshotError) else SnapshotError(str(error)))
            return None
        return segment

    def _take_over(self, old: "_Segment", fresh: "_Segment", changed: int) -> bool:
        """Bring `fresh` up to the journal; True when it is in use, or will never be.

        changed: by how many vectors more than `old`, without the journal, it differs from the saved graph.
        """
        with self._changes:
            journal = self._journal or []
            self._journal = []
            if self._closed or sum(len(ids) for ids, _ in journal) <= CHUNK:
                self._apply(journal, old, fresh)
                if not self._closed:
                    with self._lock.exclusive():
                        self._segment = fresh
                    self._unsaved += changed
                self._journal = None
                return True
        self._apply(journal, old, fresh)
        return False

    def _apply(self, journal: Journal, old: "_Segment", fresh: "_Segment") -> None:
        for ids, rows in journal:
            if rows is None:
                fresh.remove(ids)
                continue
            for start in range(0, len(ids), BUILD_CHUNK):
                if self._closed:
                    return
                chunk = slice(start, start + BUILD_CHUNK)
                with self._changes:  # an addition may move the rows in memory
                    vectors = old.vectors(rows[chunk])
                fresh.add(ids[chunk], vectors)


class _Segment:
    """A faiss index, which knows rows, and the ids of its rows. Additions must be alone; all else may meet searches."""

    def __init__(self, dimension: int, *, graph: bool) -> None:
        self.dimension = dimension
        self.graph = graph
        self._index = _empty_graph(dimension) if graph else _to_gpu(faiss.IndexFlatIP(dimension))
        self._ids: Ids = np.full(1024, -1, np.int64)  # id of each row; -1 is a tombstone
        self._rows: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def count(self) -> int:
        """Rows, tombstones included."""
        return int(self._index.ntotal)

    @property
    def dead(self) -> int:
        return self.count - len(self._rows)

    def live(self) -> tuple[Ids, Rows]:
        """Ids [N] and rows [N] of all but the tombstones."""
        rows = np.flatnonzero(self._ids[: self.count] >= 0)
        return self._ids[rows], rows

    def add(self, ids: Ids, vectors: Vectors) -> Rows:
        first = self.count
        while first + len(ids) > len(self._ids):
            self._ids = np.concatenate([self._ids, np.full_like(self._ids, -1)])
        self._index.add(vectors)
        for row, id in enumerate(ids.tolist(), first):
            replaced = self._rows.get(id)
            if replaced is not None:
                self._ids[replaced] = -1
            self._rows[id] = row
            self._ids[row] = id
        return np.arange(first, first + len(ids))

    def remove(self, ids: Ids) -> int:
        before = len(self._rows)
        for id in ids.tolist():
            row = self._rows.pop(id, None)
            if row is not None:
                self._ids[row] = -1
        return before - len(self._rows)

    def vectors(self, rows: Rows) -> Vectors:
        vectors: Vectors = self._index.reconstruct_batch(rows)
        return vectors

    def search(self, query: Vectors, k: int) -> tuple[Ids, Vectors]:
        most = min(self.count, max(k, WIDEST)) if self.graph or GPU else self.count
        if most == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        fetch = 2 * k if self.dead else k
        while True:
            fetch = min(fetch, most)
            similarities, rows = self._index.search(query[None], fetch)
            # A graph fills up with row -1 what it does not find.
            ids = np.where(rows[0] >= 0, self._ids[rows[0]], -1)
            live = np.flatnonzero(ids >= 0)[:k]
            if len(live) == k or fetch == most:
                return ids[live], similarities[0][live]
            fetch *= 4

    def write(self, file: "_Summed") -> None:
        file.write(MAGIC + self.count.to_bytes(8, "little"))
        file.write(self._ids[: self.count].tobytes())
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write, 1 << 20))  # type: ignore[attr-defined]

    @classmethod
    def load(cls, path: Path, dimension: int) -> "_Segment":
        """A saved graph. Raises SnapshotError if it is none of this width, OSError if it cannot be read."""
        with path.open("rb") as file:
            try:
                _check_sum(file)
                file.seek(len(MAGIC))
                count = int.from_bytes(file.read(8), "little")
                ids = np.frombuffer(file.read(8 * count), np.int64)
                reader = faiss.PyCallbackIOReader(file.read, 1 << 20)  # type: ignore[attr-defined]
                index: Any = faiss.read_index(reader)
                if index.ntotal != count or len(ids) != count or not isinstance(index, faiss.IndexHNSWSQ):
                    raise ValueError(f"{len(ids)} ids for {index.ntotal} vectors in a {type(index).__name__}")
                if index.d != dimension:
                    raise ValueError(f"its vectors have {index.d} values, not {dimension}")
            except (ValueError, RuntimeError) as error:
                raise SnapshotError(f"{path}: {error}") from error
        index.hnsw.efConstruction, index.hnsw.efSearch = BUILD_BEAM, SEARCH_BEAM
        segment = cls(dimension, graph=True)
        segment._index = index
        segment._ids = np.concatenate([ids, np.full(1024, -1, np.int64)])
        live, rows = segment.live()
        segment._rows = dict(zip(live.tolist(), rows.tolist(), strict=True))
        return segment


class _SharedLock:
    """Shared by many or held by one. Those who wait for an exclusive holder all come in when it leaves, so neither
    side can shut the other out."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._sharing = 0
        self._held = False  # by an exclusive holder, or wanted by one
        self._waiting = 0
        self._turn = 0  # exclusive holders that have left

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            if self._held:
                turn = self._turn
                self._waiting += 1
                self._condition.wait_for(lambda: self._turn != turn)  # whoever left has counted this one in
            else:
                self._sharing += 1
        try:
            yield
        finally:
            with self._condition:
                self._sharing -= 1
                self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._held)
            self._held = True
            self._condition.wait_for(lambda: self._sharing == 0)
        try:
            yield
        finally:
            with self._condition:
                self._held = False
                self._turn += 1
                self._sharing += self._waiting
                self._waiting = 0
                self._condition.notify_all()


class _Summed:
    """A file being written, and the checksum of what was."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.checksum = 0

    def write(self, data: bytes) -> None:
        self.checksum = zlib.crc32(data, self.checksum)
        self._file.write(data)


def _check_sum(file: BinaryIO) -> None:
    """Raise ValueError unless the file is a whole snapshot."""
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError("not an index snapshot")
    checksum = zlib.crc32(MAGIC)
    tail = b""
    while block := file.read(1 << 20):
        block = tail + block
        checksum = zlib.crc32(block[:-4], checksum)
        tail = block[-4:]
    if checksum != int.from_bytes(tail, "little"):
        raise ValueError("the snapshot is damaged")


def _empty_graph(dimension: int) -> Any:
    half: Any = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexHNSWSQ(dimension, half, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    index.train(np.zeros((1, dimension), np.float32))  # float16 has nothing to learn, but faiss asks for it
    index.hnsw.efConstruction = BUILD_BEAM
    index.hnsw.efSearch = SEARCH_BEAM
    return index


def _to_gpu(index: Any) -> Any:
    if not GPU:
        return index
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(64 << 20)  # faiss would take 1.5 GiB from the model
    return faiss.index_cpu_to_gpu(resources, 0, index)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """faiss with `count` OpenMP threads. The setting is the calling thread's own: no other thread, and after this block
    not this one either, is held back. Without it a team is woken even for one vector, and waits for cores that
    torch keeps busy."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
