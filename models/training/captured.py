"""A function of tensors as a CUDA graph: its thousands of kernels start with one launch.

A UNet's forward and backward are some two thousand kernels, which on small batches take longer to launch one by one
than to run. A batch of 256 latents is beyond that: the teacher's step takes an H200 65 ms with a graph or without.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_map

_WARM_UPS = 2


@cache
def _ground() -> tuple[Any, torch.cuda.Stream]:
    """Memory pool and stream of every graph of the process: no two run at once, and results are copied out at once."""
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream()


class Captured:
    """`function`, captured on these arguments; calls take others of the same shapes, dtypes and devices.

    It returns tensors without gradients, one or several in tuples.

    What the function does beside returning, such as adding to gradients, it does at every call; while it is captured,
    it does so a few times as well. No autograd graph of an earlier call may be alive: its nodes belong to another
    stream, which must not enter a capture.

    Raises what the function or the capture raises, with nothing left half captured.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[torch.Tensor, ...]) -> None:
        self._arguments = [argument.clone() for argument in arguments]
        pool, stream = _ground()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function(*self._arguments)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up held, the graph's own pool takes anew
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile: NCCL's watchdog does.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._result = function(*self._arguments)

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """The function's result, as tensors of the caller's own."""
        for own, given in zip(self._arguments, arguments, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tree_map(torch.Tensor.clone, self._result)
