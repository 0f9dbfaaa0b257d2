"""The asynchronous end of the bridge: the events of one request, between an engine's thread and its reader's loop."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from service.events import Event, Mergeable, is_terminal


class Request(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def n(self) -> int: ...


class Mailbox:
    """Events of one request on their way from the engine's thread to the reader's loop.

    Events that can be merged are, while they wait, so that a slow reader costs bounded memory and misses nothing that
    matters: of a picture's progress it gets the latest, of a text all that has come meanwhile in one piece.
    """

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.since = time.monotonic()
        self.started = False
        self._loop = loop
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._filled = asyncio.Event()

    def put(self, event: Event) -> bool:
        """From any thread. False when the reader's loop is gone."""
        with self._lock:
            wake = not self._events
            if isinstance(event, Mergeable):
                for at, earlier in enumerate(self._events):
                    if (both := event.merged(earlier)) is not None:
                        del self._events[at]
                        event = both
                        break
            self._events.append(event)
        if wake:
            try:
                self._loop.call_soon_threadsafe(self._filled.set)
            except RuntimeError:  # the loop is closed
                return False
        return True

    async def get(self) -> Event:
        while True:
            with self._lock:
                if self._events:
                    return self._events.pop(0)
                self._filled.clear()
            await self._filled.wait()


class RequestStream:
    """The events of one request, ending after Completed, Failed or Cancelled. One reader, on one loop.

    A reader that goes away, by `aclose`, by leaving `async with`, or by dropping the stream, aborts the request.
    """

    def __init__(self, mailbox: Mailbox, abort: Callable[[Mailbox], None]) -> None:
        self.request_id = mailbox.request.id
        self._mailbox = mailbox
        self._ended = False
        # The mailbox, not its request's id, says whose abort it is: an id may be used again once its request has ended.
        self._abort = weakref.finalize(self, abort, mailbox)
        self._abort.atexit = False

    def cancel(self) -> None:
        """Ask for the request's end; the stream goes on to its terminal event, which may still be Completed."""
        self._abort()

    async def aclose(self) -> None:
        """Abort the request unless it is terminal, and end the stream now."""
        self._ended = True
        self._abort()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self._mailbox.get()
        if is_terminal(event):
            self._ended = True
            self._abort.detach()
        return event

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
