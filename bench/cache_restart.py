"""What a restart of the cache takes: reading its entries, and the graph of a large index built anew or saved before.

python bench/cache_restart.py [ENTRIES]      200,000 unless told otherwise; a minute or two, 0.7 GB of disk

Entries as small as they can be (five latents of [4, 4, 4]) in LMDB, their embeddings those of bench/cache_lookup.py.
Until the graph is in use, lookups compare with every entry: what they take then and later is the last column.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from cache_lookup import CANDIDATES, WIDTH, Embeddings

from cache.latent.index import Index
from cache.latent.keys import Header, KeySpace, random_id
from cache.latent.lookup import LatentCache
from cache.latent.policy import nirvana
from cache.latent.store_lmdb import LmdbStore

LEVELS = {5: 0.125, 10: 0.2, 15: 0.3, 20: 0.45, 25: 0.6}
SPACE = KeySpace("default", "bench@1", "discrete", (), (4, 4, 4), 7.5, "")
BUDGET = 64 << 30


def fill(folder: Path, count: int) -> None:
    store = LmdbStore(folder, BUDGET)
    latents = [np.zeros(SPACE.shape, np.float16)] * len(LEVELS)
    for ids, vectors in Embeddings(count).entries():
        for number, vector in zip(ids, vectors, strict=True):
            prompt = f"a red fox in a green field, number {number}"
            store.put(Header(random_id(), SPACE, prompt, vector, time.time(), tuple(LEVELS.values()), ()), latents)
    store.close()


def restart(folder: Path, name: str) -> str:
    started = time.perf_counter()
    cache = LatentCache(LmdbStore(folder, BUDGET), BUDGET, nirvana(LEVELS), snapshots=folder / "index")
    read = time.perf_counter() - started
    held = cache._catalogue.space(SPACE, WIDTH)
    assert held is not None
    before = search_ms(held.index)
    held.index.settle()
    graph = time.perf_counter() - started - read
    after = search_ms(held.index)
    started = time.perf_counter()
    assert cache.close(60)
    closed = time.perf_counter() - started
    return f"| {name} | {read:.1f} | {graph:.1f} | {closed:.2f} | {before:.1f} / {after:.1f} |"


def search_ms(index: Index) -> float:
    """Median of ten."""
    times = []
    for query in Embeddings(2000).queries(10, seed=1):
        started = time.perf_counter()
        index.search(query, CANDIDATES)
        times.append(1e3 * (time.perf_counter() - started))
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("entries", nargs="?", type=int, default=200_000)
    count = parser.parse_args().entries
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), count)
        print(f"{count:,} entries:\n")
        print("| graph | entries read, s | then graph in use, s | close, s | lookup before / with it, ms |")
        print("| --- | ---: | ---: | ---: | ---: |")
        print(restart(Path(folder), "built"), flush=True)
        print(restart(Path(folder), "saved"), flush=True)


if __name__ == "__main__":
    main()
