"""What the engines say about requests in the same words, and what the bridge needs to know of the rest. No torch.

Every accepted request gets Started at most once, events of its engine's own, and exactly one of Completed, Failed,
Cancelled. Each engine's own events are beside its requests; its Completed is a subclass of the one here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

MAX_SEED = 2**32 - 1


class Event(Protocol):
    """Anything that an engine says about a request."""

    @property
    def request_id(self) -> str: ...


@runtime_checkable
class Mergeable(Protocol):
    """An event of which a slow reader is told less often, so that what waits for it stays bounded."""

    def merged(self, earlier: Event) -> Event | None:
        """This event and one that still waits to be read, as one; None: they are told one by one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds from when a request was accepted: to its first step, and to its end. Engines add their own stages."""

    queue_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Started:
    request_id: str


@dataclass(frozen=True, slots=True)
class Completed:
    request_id: str
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """`error` is a service.errors.HeadstartError."""

    request_id: str
    error: Exception
    timings: Timings = Timings()


@dataclass(frozen=True, slots=True)
class Cancelled:
    request_id: str
    timings: Timings = Timings()


def is_terminal(event: Event) -> bool:
    return isinstance(event, Completed | Failed | Cancelled)
