"""What every route needs: the settings, the metrics, and the engine once it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request

from service.bridge import Room
from service.config import Settings
from service.errors import BusyError, UnavailableError
from service.jobs.table import Table
from service.metrics import Metrics
from service.recipe import Recipe

if TYPE_CHECKING:  # importing it loads torch, and the port answers before that
    from service.api.drawing import Drawing
    from service.runtime import Runtime
    from service.writer import Writer


class Service:
    """Readiness, and the threads that compress pictures. Used from the event loop only."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self.ready_at = 0.0  # Unix time
        self.jobs: Table[Drawing] = Table(settings.jobs.ttl_s, settings.jobs.budget_bytes)
        metrics.watch_jobs(self.jobs.counts)
        self._runtime: Runtime | None = None
        self._kept: set[asyncio.Task[None]] = set()
        self._drain: asyncio.Task[None] | None = None
        self._encoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="encode")

    def open(self, runtime: Runtime) -> None:
        """From here on requests are taken."""
        self._runtime = runtime
        self.ready_at = time.time()
        self.metrics.watch(lambda: runtime.bridge.stats)
        if runtime.ranks is not None:
            self.metrics.watch_ranks(runtime.ranks)
        if runtime.latents is not None:
            self.metrics.watch_cache(runtime.latents.cache)
        if runtime.writer is not None:
            writer = runtime.writer
            writer.observe(self.metrics)
            self.metrics.watch_writer(lambda: writer.figures, lambda: writer.bridge.stats)

    @property
    def loading(self) -> bool:
        return self._runtime is None

    @property
    def runtime(self) -> Runtime:
        """The loaded model and its engine. Raises UnavailableError, saying why, when it cannot take requests."""
        if self.draining:
            raise UnavailableError("the server is shutting down", code="shutting_down")
        if self._runtime is None:
            raise UnavailableError("the model is loading", code="loading")
        if not self._runtime.bridge.ready:
            raise UnavailableError("the engine has stopped; the server's log says why", code="engine_dead")
        return self._runtime

    @property
    def writer(self) -> Writer:
        """The language model and its engine. Raises UnavailableError where there is none."""
        writer = self.runtime.writer
        if writer is None:
            raise UnavailableError(
                "no language model is served: `headstart models pull smollm2` fetches one, --llm off leaves it out",
                code="no_language_model",
            )
        if not writer.bridge.ready:
            raise UnavailableError("the language model has stopped; the server's log says why", code="engine_dead")
        return writer

    @contextlib.contextmanager
    def room(self, pictures: int) -> Iterator[Room]:
        """A place in the engine's queue (see `Bridge.room`). Raises BusyError and UnavailableError."""
        with contextlib.ExitStack() as stack:
            with refusals(self.metrics.ended):
                room = stack.enter_context(self.runtime.bridge.room(pictures))
            yield room

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it to its end, also if no connection waits for that; a shutdown does."""
        task = asyncio.create_task(work)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    def position(self, request_id: str) -> int:
        """Of a request that waits (see `Runtime.position`); asked while the server shuts down too."""
        assert self._runtime is not None  # nothing waits before
        return self._runtime.position(request_id)

    async def encode(self, pixels: np.ndarray, format: str, quality: int, recipe: Recipe | None = None) -> bytes:
        """A picture file, compressed off the event loop."""
        from service.pictures import encode  # Pillow, not needed to answer /health

        work = functools.partial(encode, pixels, format, quality, recipe)
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work)

    def begin_drain(self) -> None:
        """Take no more requests, let those that run finish within the grace period, then cancel the rest."""
        self.draining = True
        if self._runtime is not None:
            self._drain = asyncio.create_task(self._end(self._runtime))

    async def _end(self, runtime: Runtime) -> None:
        await runtime.close(self.settings.server.shutdown_grace_s)
        await asyncio.gather(*self._kept)  # their requests have ended; pictures may still be compressed

    @property
    def drained(self) -> bool:
        return self._drain is None or self._drain.done()

    async def close(self) -> None:
        """End the engine's thread, the cache's and the encoders."""
        if self._drain is None:
            self.begin_drain()
        if self._drain is not None:
            await self._drain
        self._encoders.shutdown()


@contextlib.contextmanager
def refusals(ended: Callable[[str, None], None]) -> Iterator[None]:
    """Counts a full queue's."""
    try:
        yield
    except BusyError:
        ended("rejected", None)
        raise


def service_of(request: Request) -> Service:
    """The service that the application was built around."""
    service: Service = request.app.state.service
    return service
