"""Pictures of many requests through one engine, and the time that they take."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from service.config import Settings
from service.diffusion.engine import NullObserver
from service.diffusion.request import Draft, Failed, Image, ImageRequest
from service.errors import CancelledError
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
    """

    def __init__(self, runtime: Runtime, meter: Meter, at_once: int) -> None:
        self.runtime = runtime
        self._meter = meter
        self._at_once = at_once

    def warm_up(self, template: Draft) -> None:
        """Draw one step of the template's settings, so that what is made on first use is in no one's time."""
        self.draw([self.runtime.resolve(replace(template, prompt="warming up", num_inference_steps=1), {})])

    def draw(self, requests: Sequence[ImageRequest], done: Callable[[], object] = lambda: None) -> Drawn:
        """One picture of each request; not from within an event loop.

        Args:
            done: called after each picture.

        Raises:
            HeadstartError: why a picture could not be drawn.
        """
        begun, before = time.perf_counter(), self._meter.seconds
        images = asyncio.run(self._gather(requests, done))
        return Drawn(images, time.perf_counter() - begun, self._meter.seconds - before)

    async def _gather(self, requests: Sequence[ImageRequest], done: Callable[[], object]) -> list[Image]:
        room = asyncio.Semaphore(self._at_once)

        async def picture(request: ImageRequest) -> Image:
            async with room:
                image = await self._picture(request)
            done()
            return image

        return await asyncio.gather(*(picture(request) for request in requests))

    async def _picture(self, request: ImageRequest) -> Image:
        image: Image | None = None
        async for event in self.runtime.bridge.submit(request):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Image):
                image = event
        if image is None:
            raise CancelledError("the request was cancelled")
        return image


@contextlib.contextmanager
def open_easel(settings: Settings) -> Iterator[Easel]:
    """Load the model and warm it up; its engine's thread ends with the block. Raises ModelError."""
    at_once = 2 * settings.engine.max_running
    meter = Meter()
    runtime = open_warm_runtime(replace(settings, engine=replace(settings.engine, max_waiting=at_once)), meter)
    try:
        yield Easel(runtime, meter, at_once)
    finally:
        asyncio.run(runtime.bridge.close(0))
