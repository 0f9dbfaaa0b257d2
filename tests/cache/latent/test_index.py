"""cache/latent/index.py against a brute-force model."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.latent.index import Ids, Index, Vectors, _Segment

D = 16


def unit(count: int, seed: int) -> Vectors:
    vectors = np.random.default_rng(seed).standard_normal((count, D), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nearest(vectors: dict[int, Vectors], query: Vectors, k: int) -> list[int]:
    return sorted(vectors, key=lambda id: -float(vectors[id] @ query))[:k]


def recall(index: Index, vectors: dict[int, Vectors], queries: Vectors, k: int = 1) -> float:
    found = [len(set(index.search(query, k)[0].tolist()) & set(nearest(vectors, query, k))) for query in queries]
    return sum(found) / (k * len(queries))


def filled(
    count: int, exact_limit: int, seed: int = 0, snapshot: Path | None = None
) -> tuple[Index, dict[int, Vectors]]:
    vectors = unit(count, seed)
    index = Index(D, exact_limit, snapshot=snapshot)
    index.add(np.arange(count), vectors)
    assert index.settle(30)
    return index, dict(enumerate(vectors))


OPERATIONS = st.one_of(
    st.tuples(st.just("add"), st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(0, 1000)),
    st.tuples(st.just("remove"), st.lists(st.integers(0, 30), max_size=12)),
    st.tuples(st.just("search"), st.integers(1, 40), st.integers(0, 1000)),
)


@settings(max_examples=50, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=30))
def test_exact_search_is_brute_force(operations: list[tuple[object, ...]]) -> None:
    index = Index(D)
    model: dict[int, Vectors] = {}
    for operation in operations:
        match operation:
            case ("add", list(ids), int(seed)):
                vectors = unit(len(ids), seed)
                index.add(np.array(ids), vectors)
                model.update(zip(ids, vectors, strict=True))
            case ("remove", list(ids)):
                assert index.remove(np.array(ids, np.int64)) == len(
                    {id for id in ids if model.pop(id, None) is not None}
                )
            case ("search", int(k), int(seed)):
                query = unit(1, seed + 5000)[0]
                ids, similarities = index.search(query, k)
                # By value: among equal vectors any may come first.
                best = [model[id] @ query for id in nearest(model, query, k)]
                np.testing.assert_allclose(similarities, best, atol=1e-6)
                np.testing.assert_allclose([model[id] @ query for id in ids.tolist()], best, atol=1e-6)
                assert len(set(ids.tolist())) == len(best)
                assert (np.diff(similarities) <= 0).all()
        assert len(index) == len(model)
    assert sorted(index.ids().tolist()) == sorted(model)


def test_past_the_limit_a_graph_takes_over_and_finds_the_same() -> None:
    index, model = filled(3000, exact_limit=1000)
    assert not index.exact
    assert len(index) == 3000
    assert recall(index, model, unit(100, 1)) >= 0.98
    ids, similarities = index.search(model[7], 3)
    assert ids[0] == 7
    assert similarities[0] == pytest.approx(1.0, abs=2e-3)  # float16


def test_removed_and_replaced_rows_of_a_graph_are_not_found() -> None:
    index, model = filled(2000, exact_limit=500)
    query = unit(1, 3)[0]
    gone = nearest(model, query, 300)
    assert index.remove(np.array(gone)) == 300
    assert index.remove(np.array(gone)) == 0
    moved = gone[0]
    index.add(np.array([moved]), query[None])
    kept = {id: vector for id, vector in model.items() if id not in gone} | {moved: query}
    ids, _ = index.search(query, 5)
    assert ids[0] == moved
    assert set(ids.tolist()) <= set(kept)
    assert len(index) == len(kept)
    assert recall(index, kept, unit(50, 4), k=5) >= 0.95


def test_tombstones_lead_to_a_rebuild_and_a_small_rest_to_an_exact_index() -> None:
    index, model = filled(2000, exact_limit=500)
    index.remove(np.arange(600))
    assert index.settle(30)
    assert index._segment.dead == 0
    assert not index.exact
    index.remove(np.arange(600, 1900))
    assert index.settle(30)
    assert index.exact
    rest = {id: model[id] for id in range(1900, 2000)}
    assert recall(index, rest, unit(20, 5), k=10) == 1.0


def test_an_empty_index_finds_nothing() -> None:
    ids, similarities = Index(D).search(unit(1, 0)[0], 4)
    assert ids.shape == similarities.shape == (0,)


def test_a_search_wakes_no_team_of_threads_and_no_other_thread_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    index, model = filled(100, exact_limit=1000)
    usual = faiss.omp_get_max_threads()
    others: list[int] = []
    seen: list[int] = []
    search = index._segment._index.search

    def watched(*arguments: object) -> object:
        seen.append(faiss.omp_get_max_threads())
        other = threading.Thread(target=lambda: others.append(faiss.omp_get_max_threads()))
        other.start()
        other.join()
        return search(*arguments)

    monkeypatch.setattr(index._segment._index, "search", watched)
    faiss.omp_set_num_threads(usual + 1)
    try:
        index.search(model[0], 1)
        assert faiss.omp_get_max_threads() == usual + 1
    finally:
        faiss.omp_set_num_threads(usual)
    assert seen == [1]
    assert others == [usual]


def test_with_a_gpu_every_index_is_flat_and_lives_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wiring only: stand-ins take the place of what faiss has for a GPU."""
    moves: list[str] = []

    class Resources:
        def setTempMemory(self, size: int) -> None:  # noqa: N802
            moves.append(f"scratch {size >> 20} MiB")

    def to_gpu(resources: object, device: int, index: object) -> object:
        moves.append(f"to {device}")
        return index

    monkeypatch.setattr("cache.latent.index.GPU", True)
    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    index, model = filled(300, exact_limit=100, snapshot=tmp_path / "index")
    assert index.exact
    assert recall(index, model, unit(10, 2)) == 1.0
    assert moves == ["scratch 64 MiB", "to 0"]
    index.save()
    assert not list(tmp_path.iterdir())  # without a graph there is nothing that is slow to make


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_threads_that_add_remove_and_search_agree_with_the_model(seed: int) -> None:
    """Each writer owns its ids, so the state at the end is known; ids 0 to 49 are never touched and must be found by
    every search, whatever rebuild is under way; an id that its owner has removed for good must never come back."""
    index = Index(D, exact_limit=150)
    fixed = unit(50, seed)
    index.add(np.arange(50), fixed)
    models: list[dict[int, Vectors]] = [{}, {}]
    errors: list[BaseException] = []
    done = threading.Event()

    def write(writer: int) -> None:
        try:
            rng = np.random.default_rng((seed, writer))
            model = models[writer]
            for _ in range(60):
                ids = 1000 * (writer + 1) + rng.choice(400, 10, replace=False)
                if rng.random() < 0.7:
                    vectors = unit(10, int(rng.integers(1 << 30)))
                    index.add(ids, vectors)
                    model.update(zip(ids.tolist(), vectors, strict=True))
                else:
                    index.remove(ids)
                    for id in ids.tolist():
                        model.pop(id, None)
                    gone = np.concatenate(
                        [index.search(vector, 20)[0] for vector in unit(2, int(rng.integers(1 << 30)))]
                    )
                    assert not set(ids.tolist()) & set(gone.tolist())
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        try:
            at = 0
            while not done.is_set():
                at = (at + 1) % 50
                ids, similarities = index.search(fixed[at], 8)
                assert ids[0] == at
                assert len(set(ids.tolist())) == len(ids)
                assert (np.diff(similarities) <= 0).all()
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not errors
    assert index.settle(30)
    model = dict(enumerate(fixed)) | models[0] | models[1]
    assert sorted(index.ids().tolist()) == sorted(model)
    for id, vector in model.items():
        ids, similarities = index.search(vector, 1)
        assert ids.tolist() == [id]
        assert similarities[0] == pytest.approx(1.0, abs=2e-3)


class Reopened(NamedTuple):
    """An index that was filled in one go beside a saved graph. built: ids for which the graph had to be built."""

    index: Index
    built: set[int]
    refused: list[str]


def reopened(path: Path, model: dict[int, Vectors], monkeypatch: pytest.MonkeyPatch) -> Reopened:
    built: set[int] = set()
    add = _Segment.add

    def watched(self: _Segment, ids: Ids, vectors: Vectors) -> Ids:
        if self.graph:
            built.update(ids.tolist())
        return add(self, ids, vectors)

    monkeypatch.setattr("cache.latent.index._Segment.add", watched)
    refused: list[str] = []
    index = Index(D, 500, snapshot=path, refused=lambda error: refused.append(str(error)))
    with index.filling():
        for start in range(0, len(model), 200):
            ids = sorted(model)[start : start + 200]
            index.add(np.array(ids), np.stack([model[id] for id in ids]))
        assert index.exact
        assert index.settle(0)
    assert index.settle(30)
    return Reopened(index, built, refused)


def test_a_saved_graph_is_grown_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, model = filled(1500, exact_limit=500, snapshot=tmp_path / "new" / "graph")
    index.save()
    again = reopened(tmp_path / "new" / "graph", model, monkeypatch)
    assert (again.built, again.refused, again.index.exact) == (set(), [], False)
    for query in unit(20, 6):
        for before, after in zip(index.search(query, 10), again.index.search(query, 10), strict=True):
            np.testing.assert_array_equal(before, after)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["graph"]


def test_what_came_and_went_since_a_graph_was_saved_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, model = filled(1500, exact_limit=500, snapshot=tmp_path / "graph")
    index.remove(np.arange(50))
    index.save()
    for id in range(150):
        del model[id]
    fresh = dict(enumerate(unit(70, 8), 9000))
    again = reopened(tmp_path / "graph", model | fresh, monkeypatch)
    assert (again.built, again.refused) == (set(fresh), [])
    assert sorted(again.index.ids().tolist()) == sorted(model | fresh)
    assert recall(again.index, model | fresh, unit(50, 9), k=5) > 0.95
    for id, vector in fresh.items():
        assert again.index.search(vector, 1)[0].tolist() == [id]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("cut", "damaged"), ("flip", "damaged"), ("other", "not an index snapshot"), ("empty", "not an index snapshot")],
)
def test_a_damaged_graph_is_told_of_and_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, reason: str
) -> None:
    path = tmp_path / "graph"
    index, model = filled(800, exact_limit=500, snapshot=path)
    index.save()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes({"cut": whole[:-100], "flip": bytes(flipped), "other": b"{}" * 100, "empty": b""}[damage])
    again = reopened(path, model, monkeypatch)
    assert again.built == set(model)
    assert recall(again.index, model, unit(50, 9)) > 0.95
    (told,) = again.refused
    assert str(path) in told
    assert reason in told
    again.index.save()
    assert reopened(path, model, monkeypatch).built == set()


def test_a_graph_that_is_mostly_of_the_past_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, model = filled(900, exact_limit=500, snapshot=tmp_path / "graph")
    index.save()
    for id in range(300):
        del model[id]
    again = reopened(tmp_path / "graph", model, monkeypatch)
    assert again.built == set(model)
    assert "of 900 rows, 300 are of no use any more" in again.refused[0]


def test_a_graph_of_another_width_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    index = Index(2 * D, 500, snapshot=tmp_path / "graph")
    index.add(np.arange(600), rng.standard_normal((600, 2 * D), dtype=np.float32))
    assert index.settle(30)
    index.save()
    again = reopened(tmp_path / "graph", dict(enumerate(unit(600, 0))), monkeypatch)
    assert "its vectors have 32 values, not 16" in again.refused[0]
    assert not again.index.exact


def test_a_graph_is_saved_when_enough_of_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph"
    index, model = filled(1000, exact_limit=500, snapshot=path)
    index.save(0.05)
    for changes, share, written in [(40, 0.05, False), (20, 0.05, True), (0, 0.0, False), (1, 0.0, True)]:
        path.write_bytes(b"old")
        for _ in range(changes):
            id = max(model) + 1
            model[id] = unit(1, id)[0]
            index.add(np.array([id]), model[id][None])
        index.save(share)
        assert (path.read_bytes() != b"old") == written
    grown = reopened(path, model, monkeypatch)
    path.write_bytes(b"old")
    grown.index.save()
    assert path.read_bytes() == b"old"  # all of it came from there
    grown.index.remove(np.arange(1))
    grown.index.save()
    assert path.read_bytes() != b"old"


def test_a_graph_that_was_given_up_or_discarded_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "graph"
    index, _ = filled(600, exact_limit=500, snapshot=path)
    index.save()
    index.remove(np.arange(400))  # few enough to be exact
    assert index.settle(30)
    assert index.exact
    index.save()
    assert not path.exists()
    path.write_bytes(b"old")
    index.discard()
    assert not path.exists()


def test_an_index_that_has_not_got_its_graph_yet_keeps_the_saved_one(tmp_path: Path) -> None:
    path = tmp_path / "graph"
    index, model = filled(600, exact_limit=500, snapshot=path)
    index.save()
    saved = path.read_bytes()
    early = Index(D, 500, snapshot=path)
    early.close()
    early.add(np.array(list(model)), np.stack(list(model.values())))
    early.save()
    assert path.read_bytes() == saved


def test_a_save_that_fails_keeps_the_snapshot_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph"
    index, _ = filled(600, exact_limit=500, snapshot=path)
    index.save()
    before = path.read_bytes()
    index.remove(np.arange(3))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            index.save()
    assert [entry.name for entry in tmp_path.iterdir()] == ["graph"]
    assert path.read_bytes() == before
    index.save()
    assert path.read_bytes() != before


def test_a_rebuild_that_fails_leaves_the_old_index_in_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory for the graph")

    monkeypatch.setattr("cache.latent.index._Segment.vectors", fail)
    index, model = filled(300, exact_limit=100)
    assert "no memory for the graph" in caplog.text
    assert index.exact
    assert recall(index, model, unit(10, 9)) == 1.0
    monkeypatch.undo()
    index._retry_at = 0.0
    index.remove(np.array([0]))
    assert index.settle(30)
    assert not index.exact


def test_a_process_that_ends_during_a_rebuild_ends_cleanly() -> None:
    # What is registered first runs last: by then no thread may be left inside faiss.
    script = (
        "import atexit, numpy as np; from cache.latent.index import Index; index = Index(64, exact_limit=1000);"
        "atexit.register(lambda: print(index.settle(0)));"
        "index.add(np.arange(20_000), np.random.default_rng(0).standard_normal((20_000, 64), dtype=np.float32));"
        "print(index.settle(0))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "False\nTrue\n", "")


def test_a_closed_index_starts_no_rebuild() -> None:
    index = Index(D, exact_limit=100)
    index.close()
    index.add(np.arange(300), unit(300, 0))
    assert index.exact
    assert index.settle(0)


@pytest.mark.parametrize(
    ("ids", "vectors", "reason"),
    [
        (np.arange(2), unit(3, 0), "shapes"),
        (np.arange(3), unit(3, 0)[:, :8], "shapes"),
        (np.array([-1]), unit(1, 0), "negative"),
        (np.array([1]), np.full((1, D), np.nan, np.float32), "not finite"),
    ],
)
def test_what_cannot_be_indexed_is_refused(ids: Ids, vectors: Vectors, reason: str) -> None:
    index = Index(D)
    with pytest.raises(ValueError, match=reason):
        index.add(ids, vectors)
    assert len(index) == 0


@pytest.mark.parametrize(
    ("query", "k", "reason"),
    [(unit(1, 0)[0][:8], 1, "shape"), (unit(1, 0)[0], 0, "k is 0"), (np.full(D, np.inf, np.float32), 1, "not finite")],
)
def test_what_cannot_be_searched_is_refused(query: Vectors, k: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Index(D).search(query, k)
