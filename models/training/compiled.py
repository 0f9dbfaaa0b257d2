"""torch.compile and CUDA graphs with a way out: what fails to compile runs eagerly, and says so loudly.

Compiling the UNet takes minutes. A rehearsal (a short run beside the real one) compiles each graph first into the
shared inductor cache and leaves a marker file; the real run waits for the marker and then loads from the cache.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from models.training.captured import Captured
from models.training.distributed import Ranks

LEAVE_MARKERS = "HEADSTART_LEAVE_MARKERS"
AWAIT_MARKERS = "HEADSTART_AWAIT_MARKERS"
OVER = "over"
_PATIENCE = 300.0
# A class's instances share dynamo's count of graphs, and a run of every stage makes more of one than the usual eight.
torch._dynamo.config.recompile_limit = 64


def enabled(ranks: Ranks) -> bool:
    """Compiling pays on GPUs only; HEADSTART_COMPILE=0 turns it off."""
    return ranks.cuda and os.environ.get("HEADSTART_COMPILE", "1") != "0"


class Compiled:
    """A function compiled for fixed shapes, then captured. With `backward`, a call runs its first result's too.

    `clear`: sets to zero the gradients that `backward` adds to. The first call uses it, after the calls that capturing
    takes, so what others had added before is lost in that one step.
    `compiles`: False where it runs eagerly from the start and takes any shapes.
    `shared`: a rehearsal compiles this graph too; if not, it runs eagerly there.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        ranks: Ranks,
        *,
        backward: bool = False,
        clear: Callable[[], None] | None = None,
        shared: bool = True,
    ) -> None:
        rehearsal = LEAVE_MARKERS in os.environ
        compiles = enabled(ranks) and (shared or not rehearsal)
        self.compiles = compiles
        self._eager = function
        self._function = torch.compile(function, dynamic=False) if compiles else function
        self._name = name
        self._ranks = ranks
        self._backward = backward
        self._clear = clear
        self._shared = shared
        self._captures = compiles and not rehearsal
        self._proven: Callable[..., Any] | None = None if compiles else self._run

    def _run(self, *arguments: torch.Tensor) -> Any:
        result = self._function(*arguments)
        if not self._backward:
            return result
        result[0].backward()
        return tree_map(torch.Tensor.detach, result)  # the autograd graph ends here: see `Captured`

    def __call__(self, *arguments: torch.Tensor) -> Any:
        return self._proven(*arguments) if self._proven is not None else self._first(*arguments)

    def _first(self, *arguments: torch.Tensor) -> Any:
        """The first call, which compiles."""
        if self._shared:
            self._await_marker()
        began = time.time()
        try:
            result = self._run(*arguments)
            torch.cuda.synchronize()
        except Exception as error:  # whatever the compiler raises, eager still trains
            self._warn("compiling", "running it EAGERLY", error)
            self._function, self._captures = self._eager, False
            self._forget()
            result = self._run(*arguments)
        self._proven = self._run
        self._ranks.log(f"compiled '{self._name}' in {time.time() - began:.0f} s")
        if self._captures:
            result = self._capture(arguments)
        if LEAVE_MARKERS in os.environ:
            (Path(os.environ[LEAVE_MARKERS]) / self._name).touch()
        return result

    def _capture(self, arguments: tuple[torch.Tensor, ...]) -> Any:
        """Capture what is compiled, if that can be; the result of one call of it."""
        began = time.time()
        proven: Callable[..., Any] = self._run
        try:
            proven = Captured(self._run, arguments)
            self._ranks.log(f"captured '{self._name}' in {time.time() - began:.1f} s")
        except Exception as error:  # uncaptured it trains as well, more slowly
            self._warn("capturing", "running it UNCAPTURED", error)
        self._forget()
        self._proven = proven
        return proven(*arguments)

    def _forget(self) -> None:
        """Take back what failed or repeated calls added to gradients."""
        if self._clear is not None:
            self._clear()

    def _warn(self, what: str, instead: str, error: Exception) -> None:
        text = f"{type(error).__name__}: {str(error)[:2000]}"
        self._ranks.warn(f"{what} '{self._name}' failed, {instead}: {text}")

    def _await_marker(self) -> None:
        """Wait until the rehearsal has compiled this graph, is over, or has taken too long."""
        if AWAIT_MARKERS not in os.environ:
            return
        folder, began = Path(os.environ[AWAIT_MARKERS]), time.time()
        while not ((folder / self._name).exists() or (folder / OVER).exists()):
            if time.time() - began > _PATIENCE:
                self._ranks.warn(
                    f"the rehearsal has not compiled '{self._name}' in {_PATIENCE:.0f} s; compiling it here"
                )
                return
            time.sleep(0.5)
        self._ranks.log(f"waited {time.time() - began:.0f} s for the rehearsal to compile '{self._name}'")
