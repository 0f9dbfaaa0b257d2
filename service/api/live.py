"""A live request as its client sees it: its events, a bad end as an error, and its own end when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request

from service.api.state import Service
from service.bridge import RequestStream
from service.errors import CancelledError, UnavailableError
from service.events import Cancelled, Completed, Event, Failed, Timings

Ended = Callable[[str, Timings], None]


@contextlib.asynccontextmanager
async def live(
    service: Service, client: Request | None, stream: RequestStream, ended: Ended
) -> AsyncIterator[AsyncIterator[Event]]:
    """The stream's events up to Completed; any other end is raised as its HeadstartError.

    The request is cancelled when the client closes its connection, and when the context is left before the end.

    Args:
        client: None: no connection that could be closed stands for the request.
        ended: told "completed", "failed" or "cancelled", and the request's timings.
    """
    watch = None if client is None else asyncio.create_task(_cancel_on_disconnect(client, stream))
    try:
        async with stream:
            yield _until_terminal(service, stream, ended)
    finally:
        if watch is not None:
            watch.cancel()


async def _until_terminal(service: Service, stream: RequestStream, ended: Ended) -> AsyncIterator[Event]:
    async for event in stream:
        if isinstance(event, Completed):
            ended("completed", event.timings)
        elif isinstance(event, Failed):
            ended("failed", event.timings)
            raise event.error
        elif isinstance(event, Cancelled):
            ended("cancelled", event.timings)
            if service.draining:
                raise UnavailableError("the server shut down before the request was done", code="shutting_down")
            raise CancelledError("the request was cancelled")
        yield event


async def _cancel_on_disconnect(client: Request, stream: RequestStream) -> None:
    await disconnected(client)
    stream.cancel()


async def disconnected(client: Request) -> None:
    """Waits until the client, whose request has been read, closes its connection."""
    while (await client.receive())["type"] != "http.disconnect":
        pass
