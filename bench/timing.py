"""What the kernels' benchmarks share: times of a call, with and without launching it, and a table of cases."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (1, 16, 256, 4096) if DEVICE == "cuda" else (1, 16, 256)
DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """An operation at one size: ours, torch's own way to the same end, and how far ours is from what is right.

    `moved` is the bytes that must be read and written; `difference` ends the run where it passes `limit`.
    """

    name: str
    ours: Callable[[], object]
    torchs: Callable[[], object]
    difference: float
    limit: float
    moved: int


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    titles = list(header)
    print("\n| " + " | ".join(titles) + " |")
    print("|" + " --- |" * len(titles))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def median_us(action: Callable[[], object], runs: int = 100) -> float:
    """Median microseconds from the call until its result is there, launching included."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    times = []
    for _ in range(runs + 10):
        wait()
        start = time.perf_counter()
        action()
        wait()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[10:])


def device_us(action: Callable[[], object], calls: int = 50) -> float:
    """Microseconds of one call on the GPU alone: a CUDA graph of many, so that launching does not count."""
    action()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            action()
    return median_us(graph.replay, 20) / calls


def compare(cases: Iterable[Case]) -> None:
    """Check each case, then print its times. On the CPU ours is the torch reference, and one thread runs."""
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, one thread"
    print(f"\n{name}, torch {torch.__version__}, medians in µs")
    header = ["case", "torch's", "ours", "difference"]
    if DEVICE == "cuda":
        header += ["torch's, on the device", "ours, on the device", "GB/s of ours"]

    def rows() -> Iterator[list[str]]:
        for case in cases:
            if not case.difference <= case.limit:
                sys.exit(f"{case.name}: ours is off by {case.difference:.1e}, more than {case.limit:.1e}")
            row = [case.name, f"{median_us(case.torchs):.1f}", f"{median_us(case.ours):.1f}", f"{case.difference:.1e}"]
            if DEVICE == "cuda":
                alone = device_us(case.ours)
                row += [f"{device_us(case.torchs):.2f}", f"{alone:.2f}", f"{case.moved / alone / 1e3:.0f}"]
            yield row

    with torch.inference_mode():
        print_table(header, rows())


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got.double() - expected).abs().max() / expected.abs().max())


def rounding(dtype: torch.dtype) -> float:
    """What two roundings to a dtype may do, and some arithmetic in float32 before them."""
    return torch.finfo(dtype).eps + 2e-6


def title(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
