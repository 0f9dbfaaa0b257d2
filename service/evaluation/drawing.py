"""Pictures of many requests through one engine, and the time that they take."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from service.config import DEFAULT_TENANT, Settings
from service.diffusion.engine import NullObserver
from service.diffusion.request import Draft, Image, ImageRequest
from service.errors import CancelledError, SetupError
from service.events import Failed
from service.runtime import Runtime, open_warm_runtime


class Meter(NullObserver):
    """An observer that adds up the engine's seconds: encoding, ticks and decoding."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def tick(self, pictures: int, evaluations: int, seconds: float) -> None:
        self.seconds += seconds

    def stage(self, name: str, seconds: float) -> None:
        self.seconds += seconds


class Drawn(NamedTuple):
    """In the order of the requests. wall_s: from the first request to the last picture; engine_s: the engine's part."""

    images: list[Image]
    wall_s: float
    engine_s: float


class Easel:
    """A runtime that draws many requests, so many at once that the engine's batches are full.

    Args:
        runtime: its bridge started, with `meter` as its engine's observer.
        at_once: requests that are live at a time; the engine's slots and as many again that wait for them.
        cache: the cache mode of every request.
    """

    def __init__(self, runtime: Runtime, meter: Meter, at_once: int, cache: str = "bypass") -> None:
        self.runtime = runtime
        self.cache = cache
        self._meter = meter
        self._at_once = at_once

    def warm_up(self, template: Draft) -> None:
        """Draw one step of the template's settings, so that what is made on first use is in no one's time."""
        request = self.runtime.resolve(replace(template, prompt="warming up", num_inference_steps=1), {})
        asyncio.run(self._gather([request], lambda: None, "bypass"))

    def draw(self, requests: Sequence[ImageRequest], done: Callable[[], object] = lambda: None) -> Drawn:
        """One picture of each request; not from within an event loop.

        Args:
            done: called after each picture.

        Raises:
            HeadstartError: why a picture could not be drawn.
        """
        begun, before = time.perf_counter(), self._meter.seconds
        images = asyncio.run(self._gather(requests, done, self.cache))
        return Drawn(images, time.perf_counter() - begun, self._meter.seconds - before)

    async def _gather(self, requests: Sequence[ImageRequest], done: Callable[[], object], cache: str) -> list[Image]:
        room = asyncio.Semaphore(self._at_once)

        async def picture(request: ImageRequest) -> Image:
            async with room:
                image = await self._picture(request, cache)
            done()
            return image

        return await asyncio.gather(*(picture(request) for request in requests))

    async def _picture(self, request: ImageRequest, cache: str) -> Image:
        image: Image | None = None
        draft = Draft(prompt=request.prompt, seed=request.seed)
        request = await self.runtime.with_cache(request, draft, cache, DEFAULT_TENANT)
        async for event in self.runtime.bridge.submit(request):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Image):
                image = event
        if image is None:
            raise CancelledError("the request was cancelled")
        return image


@contextlib.contextmanager
def open_easel(settings: Settings, cache: str = "bypass") -> Iterator[Easel]:
    """Load the model and warm it up; its engine's thread ends with the block.

    Args:
        cache: the cache mode of every request; the latent cache is opened for any but "bypass".

    Raises ModelError, and SetupError where there is no cache that should be used.
    """
    at_once = 2 * settings.engine.max_running
    meter = Meter()
    engine = replace(settings.engine, max_waiting=at_once)
    runtime = open_warm_runtime(replace(settings, engine=engine), meter, cached=cache != "bypass")
    try:
        if cache != "bypass" and runtime.latents is None:
            raise SetupError(f"--cache: {cache} is not allowed; {runtime.card.name} has no cache with these settings")
        yield Easel(runtime, meter, at_once, cache)
    finally:
        asyncio.run(runtime.close(0))
