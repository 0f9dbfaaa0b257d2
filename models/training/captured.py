"""A function of tensors as a CUDA graph: its thousands of kernels start with one launch.

A UNet's forward and backward are some two thousand kernels, which take longer to launch one by one than to run on a
batch of a few hundred latents.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_map

_WARM_UPS = 2


@cache
def _pool() -> Any:
    """One memory pool for every graph of the process: no two run at once, and no result outlives a call's copy."""
    return torch.cuda.graph_pool_handle()


def _copied(result: Any) -> Any:
    return tree_map(lambda value: value.detach().clone(), result)


class Captured:
    """`function`, captured on these arguments; calls take others of the same shapes, dtypes and devices.

    What the function does beside returning, such as adding to gradients, it does at every call; while it is captured,
    it does so a few times as well.

    Raises what the function or the capture raises, with nothing left half captured.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[torch.Tensor, ...]) -> None:
        self._arguments = [argument.clone() for argument in arguments]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function(*self._arguments)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up held, the graph's own pool takes anew
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile: NCCL's watchdog does.
        with torch.cuda.graph(self._graph, pool=_pool(), stream=stream, capture_error_mode="thread_local"):
            self._result = tree_map(torch.Tensor.detach, function(*self._arguments))

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """The function's result, as tensors of the caller's own."""
        for own, given in zip(self._arguments, arguments, strict=True):
            own.copy_(given)
        self._graph.replay()
        return _copied(self._result)
