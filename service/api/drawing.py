"""A request through the engine to encoded pictures, cancelled as soon as the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from starlette.requests import Request

from service.api.state import Service
from service.bridge import RequestStream
from service.diffusion.request import Cancelled, Completed, Event, Failed, Image, ImageRequest, Partial
from service.errors import CancelledError, UnavailableError
from service.recipe import recipe_of


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of the reply, as a file."""

    image: Image
    data: bytes


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request and how its pictures are to be written."""

    request: ImageRequest
    model: str
    format: str  # png | jpeg | webp
    quality: int  # 0 to 100

    @property
    def size(self) -> str:
        return f"{self.request.width}x{self.request.height}"

    async def picture(self, service: Service, image: Image) -> Picture:
        recipe = recipe_of(self.request, image.seed, self.model)
        return Picture(image, await service.encode(cast(np.ndarray, image.pixels), self.format, self.quality, recipe))

    async def preview(self, service: Service, partial: Partial) -> bytes:
        return await service.encode(cast(np.ndarray, partial.pixels), self.format, self.quality)


async def draw(service: Service, client: Request, job: Job) -> tuple[list[Picture], Completed]:
    """All pictures of a request, in order, and its last event. Raises the HeadstartError that ended it."""
    encoding: list[asyncio.Task[Picture]] = []
    completed: Completed | None = None
    try:
        request = replace(job.request, partial_images=0)  # there is no stream to show them in
        async with events_of(service, client, service.submit(request)) as events:
            async for event in events:
                if isinstance(event, Image):
                    encoding.append(asyncio.create_task(job.picture(service, event)))
                elif isinstance(event, Completed):
                    completed = event
        pictures = await asyncio.gather(*encoding)
    finally:
        for task in encoding:
            task.cancel()
    assert completed is not None  # any other end was raised
    return sorted(pictures, key=lambda picture: picture.image.index), completed


@contextlib.asynccontextmanager
async def events_of(service: Service, client: Request, stream: RequestStream) -> AsyncIterator[AsyncIterator[Event]]:
    """The stream's events up to Completed; any other end is raised as its HeadstartError.

    The request is cancelled when the client closes its connection, and when the context is left before the end.
    """
    watch = asyncio.create_task(_cancel_on_disconnect(client, stream))
    try:
        async with stream:
            yield _until_terminal(service, stream)
    finally:
        watch.cancel()


async def _until_terminal(service: Service, stream: RequestStream) -> AsyncIterator[Event]:
    async for event in stream:
        if isinstance(event, Completed):
            service.metrics.ended("completed", event.timings)
        elif isinstance(event, Image):
            service.metrics.steps_skipped.inc(event.steps_skipped)
        elif isinstance(event, Failed):
            service.metrics.ended("failed", event.timings)
            raise event.error
        elif isinstance(event, Cancelled):
            service.metrics.ended("cancelled", event.timings)
            if service.draining:
                raise UnavailableError("the server shut down before the request was done", code="shutting_down")
            raise CancelledError("the client closed the connection")
        yield event


async def _cancel_on_disconnect(client: Request, stream: RequestStream) -> None:
    while (await client.receive())["type"] != "http.disconnect":
        pass
    stream.cancel()
