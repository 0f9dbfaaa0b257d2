"""CUDA graphs of a function over static buffers, one for each size of batch: a replay costs one launch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_WARM_UPS = 2  # kernels are compiled, and libraries take their workspaces, before a capture


class BucketGraphs(Generic[T]):
    """Calls `function(size)` by replaying its graph; without CUDA, by calling it.

    The function reads the first `size` rows of buffers that stay where they are, does the same work whatever is in
    them, and waits for nothing. Its result lies where it lay at capture: the next call for that size overwrites it.

    Args:
        sizes: the buckets. A batch runs in the smallest that holds it, so the rows beyond it must be harmless.
    """

    def __init__(self, function: Callable[[int], T], sizes: Sequence[int], device: torch.device) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes: {list(sizes)}; allowed: at least one, each at least 1")
        self._function = function
        self._sizes = sorted(set(sizes))
        self._device = device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, T]] = {}

    def bucket(self, count: int) -> int | None:
        """The size in which a batch of `count` rows runs; None: it is larger than all.

        Padding buys nothing where nothing is captured, so there it is `count` itself.
        """
        if count > self._sizes[-1]:
            return None
        if self._device.type != "cuda":
            return count
        return self._sizes[bisect_left(self._sizes, count)]

    def capture(self) -> None:
        """Capture every size, the largest first, so that the smaller ones reuse its memory."""
        if self._device.type != "cuda":
            return
        pool = torch.cuda.graph_pool_handle()
        # A node of a graph keeps the priority of the stream that it was captured on.
        stream = torch.cuda.Stream(self._device, priority=torch.cuda.current_stream(self._device).priority)
        for size in reversed(self._sizes):
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._function(size)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: only this one's forbidden calls spoil the capture.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = self._function(size)
            self._graphs[size] = (graph, result)

    def __call__(self, size: int) -> T:
        """The function's result for the first `size` rows; `size` is one that `bucket` gave."""
        if size not in self._graphs:
            return self._function(size)
        graph, result = self._graphs[size]
        graph.replay()
        return result


def bucket_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 to 32, of 16 to 128, of 32 beyond; the last is `most`."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 128, 16), *range(128, most, 32)]
    return [size for size in sizes if size < most] + [most]
