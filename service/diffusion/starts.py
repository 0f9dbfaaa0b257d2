"""What a picture may start from instead of noise: a latent that a similar prompt left behind. No torch.

The engine sees a `Starts` only through `GuardedStarts`, so that a cache in trouble costs hits and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import numpy as np

from accel.samplers.library import entry_row
from accel.samplers.plans import Plan, Row
from service.diffusion.request import ImageRequest

log = logging.getLogger(__name__)

PATIENCE_S = 0.25  # a lookup that takes longer is a miss; sound ones take about a millisecond
BACKLOG = 64  # requests whose latents wait to be kept
QUIET_S = 60.0  # between two lines in the log about faults

Shape = tuple[int, int, int]  # latent channels, height, width


class Start(NamedTuple):
    """A latent of another picture, its noise level, and how near that picture's prompt is."""

    latent: np.ndarray  # [C, h, w] float16
    alpha: float  # signal scale, above 0
    similarity: float  # cosine
    row: int | None = None  # where the plan is entered; None: as late as the latent allows

    def entry(self, rows: Sequence[Row]) -> int:
        """The row of the plan that it enters, to which it is re-noised under the picture's own seed; 0: it cannot."""
        last = entry_row(rows, self.alpha)
        if self.row is None:
            return last
        return self.row if 0 < self.row <= last else 0


class Starts(Protocol):
    """Where latents come from and go to. Called from two threads, never from two at once."""

    def find(self, request: ImageRequest, plan: Plan) -> Sequence[Start | None]:
        """One for each picture of a request that looks (`request.cache.look`); None for those that start from noise."""
        ...

    def marks(self, request: ImageRequest, plan: Plan) -> Sequence[int]:
        """Rows from 1 on whose input latents are to be kept. Called from the engine's thread."""
        ...

    def keep(self, request: ImageRequest, latents: Mapping[float, np.ndarray]) -> None:
        """Take the latents ([C, h, w] float16, by alpha) of the first picture of a completed request."""
        ...


class Wanted(NamedTuple):
    """What `find` is asked, and the shape that its answer must have."""

    request: ImageRequest
    plan: Plan
    shape: Shape


class GuardedStarts:
    """Another Starts, run on a thread of its own: what fails there or hangs is a miss, or is not kept.

    faults: what came to nothing, by the kinds of CACHE_FAULTS.
    observe: told of each fault's kind, from several threads.
    """

    def __init__(self, starts: Starts, observe: Callable[[str], None] = lambda kind: None) -> None:
        self.faults: Counter[str] = Counter()
        self._observe = observe
        self._starts = starts
        self._pool = ThreadPoolExecutor(1, "starts")  # its thread ends with this object
        self._late: Future[list[list[Start | None]]] | None = None  # the lookup last given up
        self._keeping: list[Future[None]] = []
        self._told = -QUIET_S
        self._lock = threading.Lock()

    def find(self, wanted: Sequence[Wanted]) -> list[list[Start | None]]:
        """Starts for each picture of each request, waiting PATIENCE_S at most; while a late lookup hangs, not at all.

        All of them have the request's shape, are finite and enter its plan at row 1 or later.
        """
        nothing: list[list[Start | None]] = [[None] * request.n for request, _, _ in wanted]
        if self._late is not None and not self._late.done():
            self._fault("late", "an earlier lookup is not back yet")
            return nothing
        call = self._pool.submit(lambda: [self._find(each) for each in wanted])
        try:
            return call.result(PATIENCE_S)
        except TimeoutError:
            self._late = call
            self._fault("late", f"a lookup took more than {PATIENCE_S:g} s")
            return nothing

    def marks(self, request: ImageRequest, plan: Plan) -> frozenset[int]:
        """Rows of the plan whose input latents are to be kept."""
        try:
            return frozenset(self._starts.marks(request, plan)) & frozenset(range(1, len(plan)))
        except Exception as error:
            self._fault("marks", "the latents to keep were not chosen", error)
            return frozenset()

    def keep(self, request: ImageRequest, latents: Mapping[float, np.ndarray]) -> None:
        """Hand over those of the latents that are finite; does not wait."""
        self._keeping = [call for call in self._keeping if not call.done()]
        if len(self._keeping) == BACKLOG:
            self._fault("backlog", f"{BACKLOG} requests wait to be kept: one is dropped")
        else:
            self._keeping.append(self._pool.submit(self._keep, request, latents))

    def settle(self, timeout_s: float) -> None:
        """Wait until what was handed over is kept, at most so long."""
        wait(self._keeping, timeout_s)

    def _find(self, wanted: Wanted) -> list[Start | None]:
        request, plan, shape = wanted
        try:
            found = list(self._starts.find(request, plan))
        except Exception as error:
            self._fault("lookup", "a lookup failed", error)
            found = []
        found = (found + [None] * request.n)[: request.n]
        return [start if start is None or self._usable(start, plan, shape) else None for start in found]

    def _usable(self, start: Start, plan: Plan, shape: Shape) -> bool:
        latent, alpha = start.latent, start.alpha
        fits = latent.shape == shape and 0 < alpha <= 1 and start.entry(plan.rows) > 0
        if not fits or not np.isfinite(latent).all():
            what = f"a start of shape {latent.shape} at alpha {alpha:g} does not fit a picture of shape {shape}"
            self._fault("unusable", what)
            return False
        return True

    def _keep(self, request: ImageRequest, latents: Mapping[float, np.ndarray]) -> None:
        finite = {alpha: latent for alpha, latent in latents.items() if np.isfinite(latent).all()}
        try:
            if finite:
                self._starts.keep(request, finite)
        except Exception as error:
            self._fault("keep", "latents were not kept", error)

    def _fault(self, kind: str, what: str, error: Exception | None = None) -> None:
        with self._lock:
            self.faults[kind] += 1
            count = self.faults.total()
            now = time.monotonic()
            tell = now - self._told >= QUIET_S
            self._told = now if tell else self._told
        self._observe(kind)
        if tell:
            log.warning("cache: %s (%d faults so far)", what, count, exc_info=error)
