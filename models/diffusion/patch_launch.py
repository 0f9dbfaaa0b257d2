"""How a patch network's kernels are started: one by one, compiled, or as CUDA graphs.

At a fraction of a picture a rank the GPU is done before the host has launched its work: only a graph keeps it busy. One
graph is captured for each shape of call, of synchronous and of displaced ones. Capturing takes a second, compiling the
network minutes for every shape, and only what is compiled fuses what lies between its matrix products.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

LAUNCHES = ("eager", "compile", "capture", "graph")  # capture: graphs of the network as it is; graph: compiled first
COMPILED_SHAPES = 64  # dynamo's own limit of 8 is met by a few sizes of picture and of batch
CAPTURED_CALLS = 8  # graphs kept; each holds the activations of a call


class Launcher:
    """Calls `function(*inputs)`, `inputs` being trees of tensors, in one of the ways of LAUNCHES.

    A call with a key is captured when it comes for the second time, and replayed from then on: the first has loaded its
    kernels. The result of a replay lies where it lay at capture, and the next overwrites it.
    """

    def __init__(self, network: Any, how: str, device: torch.device) -> None:
        if how not in LAUNCHES or (how in LAUNCHES[2:] and device.type != "cuda"):
            allowed = LAUNCHES if device.type == "cuda" else LAUNCHES[:2]
            raise ValueError(f"launch: {how!r}; allowed on {device.type}: {', '.join(allowed)}")
        self.network = network
        if how in ("compile", "graph"):
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
            self.network = torch.compile(network, dynamic=False)
        self._captures = how in LAUNCHES[2:]
        self._graphs: OrderedDict[Hashable, _Captured | None] = OrderedDict()  # None: called once

    def __call__(
        self, key: Hashable | None, function: Callable[..., torch.Tensor], settle: Callable[[], None], *inputs: Any
    ) -> torch.Tensor:
        """`key`: of all that the call depends on besides the contents of `inputs`; None: it is not to be captured.

        `settle` makes the computation wait for all that earlier calls have left on its way.
        """
        if not self._captures or key is None:
            return function(*inputs)
        leaves, spec = tree_flatten(inputs)
        key = (key, spec, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._graphs:
            self._graphs[key] = None
            return function(*inputs)
        captured = self._graphs[key]
        self._graphs.move_to_end(key)
        settle()  # a graph does not wait for anything outside of it
        if captured is None:
            while len(self._graphs) > CAPTURED_CALLS:
                self._graphs.popitem(last=False)
            # No two graphs run at once, and a result is read before the next replay, so that they share their memory:
            # that of a graph still held, because memory whose last graph is gone cannot be captured into again.
            pool = next((graph.pool for graph in self._graphs.values() if graph is not None), None)
            captured = _Captured(lambda own: function(*tree_unflatten(own, spec)), leaves, pool)
            self._graphs[key] = captured
        return captured(leaves)


class _Captured:
    def __init__(
        self, function: Callable[[list[torch.Tensor]], torch.Tensor], leaves: Sequence[torch.Tensor], pool: Any
    ) -> None:
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self._own = [leaf.clone() for leaf in leaves]
        self._given = list(leaves)  # held, so that a tensor that comes again is known to be in place
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile: NCCL's watchdog does.
        with torch.cuda.graph(self._graph, pool=self.pool, capture_error_mode="thread_local"):
            self._result = function(self._own)

    def __call__(self, leaves: Sequence[torch.Tensor]) -> torch.Tensor:
        for own, given, before in zip(self._own, leaves, self._given, strict=True):
            if given is not before:  # a prompt's keys and values stay the same from step to step
                own.copy_(given)
        self._given = list(leaves)
        self._graph.replay()
        return self._result
