"""Speed and size of the stores of latents: the figures of docs/benchmarks.md.

python bench/cache_store.py [--entries 500] [--reads 5000] [--redis redis://127.0.0.1:6379]

Entries have five latents and an embedding of 512. Reads choose entries and levels at random; everything is in memory
after the writes, as it is in a cache that is used. "Beside writes": while another thread puts and removes entries.
"Taken" is what LMDB's and Redis's own statistics say, beside what the sizes of the entries add up to.
"""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import redis

from cache.latent.codec import decode_latent, encode_latent
from cache.latent.keys import Header, KeySpace, random_id
from cache.latent.store import Store
from cache.latent.store_lmdb import LmdbStore
from cache.latent.store_redis import RedisStore

LEVELS = (0.125, 0.2, 0.3, 0.45, 0.6)
SHAPES = ((4, 64, 64), (4, 32, 32))
COLUMNS = (
    "store",
    "latent",
    "read p50 / p99, ms",
    "beside writes, ms",
    "put an entry, ms",
    "headers/s",
    "KiB an entry",
    "taken, beside accounted",
)

Latents = list[np.ndarray[Any, np.dtype[np.float16]]]


def an_entry(random: np.random.Generator, shape: tuple[int, int, int]) -> tuple[Header, Latents]:
    """Latents as they are on the way: noise, and a smooth picture below it."""
    channels, height, width = shape
    smooth = np.kron(random.standard_normal((channels, 8, 8)), np.ones((1, height // 8, width // 8)))
    latents = [
        (alpha * smooth + np.sqrt(1 - alpha**2) * random.standard_normal(shape)).astype(np.float16) for alpha in LEVELS
    ]
    space = KeySpace("default", "bench@1", "ddpm", (), shape, 7.5, "")
    embedding = random.standard_normal(512).astype(np.float32)
    embedding /= np.linalg.norm(embedding)
    return Header(random_id(), space, "a red fox in the snow, watercolour", embedding, time.time(), LEVELS, ()), latents


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed_reads(store: Store, headers: list[Header], count: int, random: np.random.Generator) -> list[float]:
    """Milliseconds of each read."""
    times = []
    for _ in range(count):
        id, level = headers[random.integers(len(headers))].id, LEVELS[random.integers(len(LEVELS))]
        start = time.perf_counter()
        found = store.get(id, level)
        times.append((time.perf_counter() - start) * 1000)
        if found is None:
            raise SystemExit(f"{id} at {level} is not there")
    return times


def reads_beside_writes(
    store: Store, headers: list[Header], count: int, random: np.random.Generator, shape: tuple[int, int, int]
) -> list[float]:
    stop = threading.Event()
    header, latents = an_entry(random, shape)

    def write() -> None:
        while not stop.wait(0.02):  # as many as a busy GPU has to keep
            store.put(header, latents)
            store.remove(header.id)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        return timed_reads(store, headers, count, random)
    finally:
        stop.set()
        writer.join()


def percentiles(times: list[float]) -> str:
    return " / ".join(f"{p:.2f}" for p in np.percentile(times, [50, 99]))


def redis_bytes(server: Any, prefix: str) -> int:
    keys = [key for key in server.scan_iter(f"{prefix}*") if not key.endswith(b":log")]
    return sum(server.memory_usage(key, samples=0) for key in keys)


def codec_row(shape: tuple[int, int, int]) -> str:
    """Medians over 200 latents."""
    latents = an_entry(np.random.default_rng(0), shape)[1] * 40
    records: list[bytes] = []
    writing = [seconds(partial(lambda latent: records.append(encode_latent(1, 0.5, latent)), one)) for one in latents]
    reading = [seconds(partial(decode_latent, record, 1, 0.5)) for record in records]
    raw = latents[0].nbytes
    share = sum(map(len, records)) / raw / len(latents)
    times = f"{np.median(writing) * 1000:.3f} | {np.median(reading) * 1000:.3f}"
    return f"| {list(shape)}, {raw >> 10} KiB | {share:.1%} | {times} |"


def row(name: str, store: Store, options: argparse.Namespace, shape: tuple[int, int, int]) -> tuple[str, int]:
    """A row of the table, and what the entries' sizes add up to."""
    random = np.random.default_rng(1)
    entries = [an_entry(random, shape) for _ in range(options.entries)]
    headers: list[Header] = []
    putting = seconds(lambda: headers.extend(store.put(*entry) for entry in entries))
    if isinstance(store, LmdbStore):
        putting += seconds(store.flush)
    scanning = seconds(lambda: list(store.headers()))
    reads = percentiles(timed_reads(store, headers, options.reads, random))
    beside = percentiles(reads_beside_writes(store, headers, options.reads, random, shape))
    accounted = sum(sum(header.sizes) for header in headers)
    columns = [
        name,
        f"{int(np.prod(shape)) * 2 >> 10} KiB",
        reads,
        beside,
        f"{putting * 1000 / len(entries):.2f}",
        f"{len(entries) / scanning:.0f}",
        f"{accounted / len(entries) / 1024:.1f}",
    ]
    return "| " + " | ".join(columns), accounted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=500)
    parser.add_argument("--reads", type=int, default=5000)
    parser.add_argument("--redis", default=os.environ.get("HEADSTART_REDIS_URL", "redis://127.0.0.1:6379"))
    options = parser.parse_args()

    print("| latent | record, of raw | write, ms | read, ms |\n| --- | --- | --- | --- |")
    for shape in SHAPES:
        print(codec_row(shape))
    print(f"\n| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|")
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            store = LmdbStore(Path(folder), 8 << 30)
            line, accounted = row("LMDB", store, options, shape)
            store.flush()
            print(f"{line} | {store.used_bytes / accounted - 1:+.2%} |")
            store.close()
    for shape in SHAPES:
        name = f"bench-{secrets.token_hex(8)}"
        prefix = f"headstart:{name}:"
        shared = RedisStore(options.redis, name)
        with redis.Redis.from_url(options.redis) as server:
            try:
                line, accounted = row("Redis", shared, options, shape)
                print(f"{line} | {redis_bytes(server, prefix) / accounted - 1:+.2%} |")
            finally:
                for key in server.scan_iter(f"{prefix}*"):
                    server.delete(key)
        shared.close()


if __name__ == "__main__":
    main()
