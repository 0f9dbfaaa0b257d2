"""One job: what its client can come back for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from service.diffusion.request import Progress, State
from service.errors import HeadstartError
from service.events import Event, Started

T = TypeVar("T")


class Ticket(Generic[T]):
    """Queued, perhaps in progress, then completed, failed or cancelled for good. Used from the event loop only.

    Args:
        id: of the request that is drawn.
        name: the client's own `request_id`.
        fields: what was asked for; the values are digests, so that no field's length costs memory.
        created: Unix time.
    """

    def __init__(self, id: str, tenant: str, name: str | None, fields: Mapping[str, str], created: float) -> None:
        self.id = id
        self.tenant = tenant
        self.name = name
        self.fields = fields
        self.created = created
        self.state = State.QUEUED
        self.result: T | None = None
        self.error: HeadstartError | None = None
        self.size = 0  # bytes that its result takes
        self.refused = False  # never accepted: `error` says why, and no table has it
        self.replies = 0  # connections that wait for its end
        self.detached = False  # wanted even if no connection waits
        self.accepted = asyncio.Event()  # or refused
        self.ended = asyncio.Event()
        self._steps: list[tuple[int, int]] = []  # done, and to do in all, of each picture
        self._cancelling = False
        self._abort: Callable[[], None] | None = None

    @property
    def steps_done(self) -> int:
        return sum(done for done, _ in self._steps)

    @property
    def steps(self) -> int:
        """Of all its pictures; 0 until it has been accepted."""
        return sum(steps for _, steps in self._steps)

    def accept(self, pictures: int, steps: int, abort: Callable[[], None]) -> None:
        """The engine has it: so many steps a picture, and a way to end it."""
        self._steps = [(0, steps)] * pictures
        self._abort = abort
        self.accepted.set()
        if self._cancelling:
            abort()

    def cancel(self) -> None:
        """Ask for its end, before it has been accepted too. Nothing happens to one that has ended."""
        self._cancelling = True
        if self._abort is not None:
            self._abort()

    def note(self, event: Event) -> None:
        """What the engine says on the way."""
        if isinstance(event, Started):
            self.state = State.IN_PROGRESS
        elif isinstance(event, Progress):
            self._steps[event.index] = (event.step, event.steps)

    def end(self, state: State, result: T | None = None, error: HeadstartError | None = None, size: int = 0) -> None:
        """Once. A refusal ends it too."""
        assert state.terminal
        assert not self.state.terminal
        self.state, self.result, self.error, self.size = state, result, error, size
        self._abort = None
        self.accepted.set()
        self.ended.set()
