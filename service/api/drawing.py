"""A request through the engine to encoded pictures, cancelled as soon as the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from starlette.requests import Request

from service.api.live import live
from service.api.rewrite import rewritten
from service.api.schemas import DrawBody
from service.api.state import Service
from service.bridge import RequestStream
from service.diffusion.request import Completed, Image, ImageRequest, Partial
from service.errors import invalid
from service.events import Event
from service.recipe import recipe_of

if TYPE_CHECKING:  # importing it loads torch, and the port answers before that
    from service.llm.rewrite import Rewrite


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
    prompt: str  # as it was sent; the request has what is drawn
    rewrite: Rewrite | None  # what became of it, if it was to be rewritten
    embed_s: float = 0.0  # what the prompt's embedding took, before the engine had the request

    @property
    def size(self) -> str:
        return f"{self.request.width}x{self.request.height}"

    def timings(self, completed: Completed) -> dict[str, float]:
        """Of the reply: embedding the prompt is part of looking it up, and rewriting it comes before all."""
        engine, rewrite_s = completed.timings, 0.0 if self.rewrite is None else self.rewrite.seconds
        lookup_s, total_s = engine.lookup_s + self.embed_s, engine.total_s + self.embed_s + rewrite_s
        return {"rewrite_s": rewrite_s} | asdict(replace(engine, lookup_s=lookup_s, total_s=total_s))

    def prompt_facts(self) -> dict[str, Any]:
        """What a reply says of the prompt: what was drawn and, if it was to be rewritten, what became of that."""
        return {"revised_prompt": self.request.prompt} | (
            {} if self.rewrite is None else {"rewrite": self.rewrite.facts}
        )

    async def picture(self, service: Service, image: Image) -> Picture:
        recipe = recipe_of(self.request, image.seed, self.model, image.steps_skipped)
        return Picture(image, await service.encode(cast(np.ndarray, image.pixels), self.format, self.quality, recipe))

    async def preview(self, service: Service, partial: Partial) -> bytes:
        return await service.encode(cast(np.ndarray, partial.pixels), self.format, self.quality)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A request that is done."""

    job: Job
    pictures: list[Picture]  # in the order of their seeds
    completed: Completed
    created: int  # Unix time


async def accept(
    service: Service, tenant: str, body: DrawBody, format: str, id: str | None = None
) -> tuple[Job, RequestStream]:
    """What the body asks for, checked, its prompt rewritten if it asks for that and embedded if the cache is to be
    asked, and handed to the engine.

    Args:
        id: the request's; None: one of its own.

    Raises:
        InputError: in the names of the body's fields.
        BusyError: the queue is full; the prompt has been neither rewritten nor embedded then.
        UnavailableError: no requests are taken.
    """
    runtime, draft = service.runtime, body.draft()
    request = runtime.resolve(draft, body.names)
    if id is not None:
        request = replace(request, id=id)
    if not body.stream:
        request = replace(request, partial_images=0)  # there is nowhere to show them
    if body.enhance_prompt and runtime.card.max_prompt_tokens is None:
        raise invalid("enhance_prompt", True, "false: this model reads no prompts")
    prompt, rewrite = request.prompt, None
    with service.room(request.n) as room:
        if body.enhance_prompt:
            rewrite = await rewritten(service, tenant, prompt)
            request = replace(request, prompt=rewrite.prompt)
        begun = time.monotonic()
        request = await runtime.with_cache(request, draft, body.cache or "auto", tenant)
        embed_s = 0.0
        if request.cache is not None:
            embed_s = time.monotonic() - begun
            service.metrics.stage("embed", embed_s)
        stream = runtime.bridge.submit(request, room)
    return Job(request, runtime.card.name, format, body.quality, prompt, rewrite, embed_s), stream


def cache_facts(image: Image) -> dict[str, Any]:
    """What a reply says of the cache's part in a picture; never whose prompt it started from, nor which."""
    return {
        "result": image.cache_result,
        "similarity": None if image.similarity is None else round(min(image.similarity, 1.0), 4),
        "steps_skipped": image.steps_skipped,
        "steps_run": image.steps_run,
    }


async def draw(
    service: Service,
    client: Request | None,
    job: Job,
    stream: RequestStream,
    note: Callable[[Event], None] = lambda _event: None,
) -> Drawing:
    """All pictures of a request. Raises the HeadstartError that ended it.

    Args:
        note: told every event.
    """
    encoding: list[asyncio.Task[Picture]] = []
    completed: Completed | None = None
    try:
        async with events_of(service, client, stream) as events:
            async for event in events:
                note(event)
                if isinstance(event, Image):
                    encoding.append(asyncio.create_task(job.picture(service, event)))
                elif isinstance(event, Completed):
                    completed = event
        pictures = await asyncio.gather(*encoding)
    finally:
        for task in encoding:
            task.cancel()
    assert completed is not None  # any other end was raised
    return Drawing(job, sorted(pictures, key=lambda picture: picture.image.index), completed, int(time.time()))


@contextlib.asynccontextmanager
async def events_of(
    service: Service, client: Request | None, stream: RequestStream
) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of a drawing, counted; see `live`."""
    async with live(service, client, stream, service.metrics.ended) as events:
        yield _counted(service, events)


async def _counted(service: Service, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    async for event in events:
        if isinstance(event, Image):
            service.metrics.finished(event)
        yield event
