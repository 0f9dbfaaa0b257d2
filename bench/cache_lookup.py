"""Searching the cache's index of embeddings: time, recall and memory by size, as a Markdown table.

python bench/cache_lookup.py [--full]      --full adds a million entries: some minutes on two cores, 4 GB of memory

The embeddings are made, and clustered as those of prompts are: one topic for 200 entries, each topic with about 20
sessions, each session with 10 prompts that differ in an attribute. An entry is the unit vector along
topic + 0.5·session + 0.25·prompt, all three normal with a variance that falls as 1/(1 + i) over the 256 coordinates. A
query is a prompt that is not in the index: for one half of a session that is, for the other half of a new session of a
topic that is.

recall@1 is the share of queries whose best answer is as similar as that of exact search in float32 (to 0.001, float16's
error). "adding" is the p99 of searches while another thread adds 50 entries a second; MB is the memory that the process
has gained once the index is built.
"""

import argparse
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache.latent.index import Ids, Index, Vectors

WIDTH = 256
TOPIC, SESSION = 200, 10  # entries a topic and a session
QUERIES = 2000
CANDIDATES = 16
COLUMNS = "| entries | search | build s | p50 ms | p99 ms | p99 ms, adding | recall@1 | MB | bytes an entry |"


class Embeddings:
    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self._topics = normal(rng, count // TOPIC)
        self._sessions = self._some_sessions(rng, count // SESSION)

    def entries(self, chunk: int = 10_000) -> Iterator[tuple[Ids, Vectors]]:
        """The same ones every time."""
        rng = np.random.default_rng(1)
        for start in range(0, len(self._sessions), chunk // SESSION):
            sessions = self._sessions[start : start + chunk // SESSION]
            ids = np.arange(start * SESSION, (start + len(sessions)) * SESSION)
            yield ids, prompts(rng, np.repeat(sessions, SESSION, axis=0))

    def queries(self, count: int, seed: int) -> Vectors:
        rng = np.random.default_rng(seed)
        known = rng.choice(self._sessions, count // 2)
        return prompts(rng, np.concatenate([known, self._some_sessions(rng, count - len(known))]))

    def _some_sessions(self, rng: np.random.Generator, count: int) -> Vectors:
        return rng.choice(self._topics, count) + 0.5 * normal(rng, count)


def normal(rng: np.random.Generator, count: int) -> Vectors:
    scale = (1 / np.sqrt(1 + np.arange(WIDTH))).astype(np.float32)
    return rng.standard_normal((count, WIDTH), dtype=np.float32) * scale


def prompts(rng: np.random.Generator, sessions: Vectors) -> Vectors:
    vectors = sessions + 0.25 * normal(rng, len(sessions))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Times(NamedTuple):
    milliseconds: list[float]
    best: list[float]


def search_all(index: Index, queries: Vectors) -> Times:
    times = Times([], [])
    for query in queries:
        started = time.perf_counter()
        _, similarities = index.search(query, CANDIDATES)
        times.milliseconds.append(1e3 * (time.perf_counter() - started))
        times.best.append(float(similarities[0]))
    return times


def search_while_adding(index: Index, queries: Vectors, fresh: Vectors) -> Times:
    done = threading.Event()

    def add() -> None:
        for id, vector in enumerate(fresh, 10**9):
            index.add(np.array([id]), vector[None])
            if done.wait(1 / 50):
                return

    adding = threading.Thread(target=add)
    adding.start()
    times = search_all(index, queries)
    done.set()
    adding.join()
    return times


def resident_mb() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024 / 1e6


def row(count: int, exact: bool) -> str:
    embeddings = Embeddings(count)
    queries = embeddings.queries(QUERIES, seed=2)
    truth = np.full(QUERIES, -1, np.float32)
    for _, vectors in embeddings.entries():
        truth = np.maximum(truth, (queries @ vectors.T).max(axis=1))
    before = resident_mb()
    index = Index(WIDTH, exact_limit=2 * count if exact else count // 2, build_threads=cpu_count() or 1)
    started = time.perf_counter()
    for ids, vectors in embeddings.entries():
        index.add(ids, vectors)
    index.settle()
    built = time.perf_counter() - started
    gained = resident_mb() - before
    assert index.exact == exact
    search_all(index, queries[:100])
    alone = search_all(index, queries)
    adding = search_while_adding(index, queries, embeddings.queries(QUERIES, seed=3))
    p50, p99 = np.percentile(alone.milliseconds, [50, 99])
    recall = float(np.mean(np.array(alone.best) >= truth - 1e-3))
    return (
        f"| {count:,} | {'exact' if exact else 'HNSW'} | {built:.1f} | {p50:.2f} | {p99:.2f} "
        f"| {np.percentile(adding.milliseconds, 99):.2f} | {recall:.3f} | {gained:.0f} | {1e6 * gained / count:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also a million entries")
    sizes = [(10_000, True), (100_000, True), (100_000, False)]
    if parser.parse_args().full:
        sizes.append((1_000_000, False))
    print(COLUMNS)
    print("| " + " | ".join(["---:", "---", *["---:"] * 7]) + " |", flush=True)
    for count, exact in sizes:
        # A process for each: its memory is the index's alone.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            print(pool.submit(row, count, exact).result(), flush=True)


if __name__ == "__main__":
    main()
