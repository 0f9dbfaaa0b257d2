"""Runs an engine in its own thread; what it says becomes asynchronous streams of events.

It knows neither pictures nor text: any engine will do that has `add`, `abort`, `step`, `has_work` and `fail_all`, which
are called from the engine's thread only. Commands travel to the thread in a list under a condition variable, on which
an idle thread sleeps. Events travel back through one mailbox a request (`service/stream.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from service.errors import BusyError, ConflictError, HeadstartError, UnavailableError
from service.events import Cancelled, Completed, Event, Failed, Started, Timings, is_terminal
from service.stream import Mailbox, Request, RequestStream

__all__ = ["ABORT_S", "Bridge", "Engine", "RequestStream", "Stats"]

log = logging.getLogger(__name__)

ABORT_S = 10.0  # after the grace: how long the engine may take to end its current tick
MAX_RETRY_AFTER_S = 300


R_contra = TypeVar("R_contra", bound=Request, contravariant=True)
T = TypeVar("T")


class Engine(Protocol[R_contra]):
    def add(self, request: R_contra) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> Sequence[Event]: ...
    def has_work(self) -> bool: ...
    def fail_all(self, error: HeadstartError) -> Sequence[Event]: ...


class Limits(Protocol):
    @property
    def max_waiting(self) -> int: ...


class Stats(NamedTuple):
    """Live requests: those that have started, and those that have not."""

    running: int
    waiting: int


@dataclass(slots=True, eq=False)
class Room:
    """Places in the queue that are kept for a request; none once it has been submitted."""

    places: int


class Bridge(Generic[R_contra]):
    """An engine, its thread, and the requests that are live in it.

    Args:
        limits: `max_waiting` places in the queue; a request takes `n`.
        noun: what takes a place, as errors call it.
        thread: its name.
        around: what the thread runs in: a stream of the device, say.
    """

    def __init__(
        self,
        engine: Engine[R_contra],
        limits: Limits,
        *,
        noun: str = "pictures",
        thread: str = "engine",
        around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self._engine = engine
        self._max_waiting = limits.max_waiting
        self._noun = noun
        self._around = around
        self._condition = threading.Condition()  # guards everything below
        self._live: dict[str, Mailbox] = {}
        self._waiting = 0  # places of live requests that have not started, and of requests yet to be submitted
        self._commands: list[Callable[[], None]] = []
        self._calls: set[Future[Any]] = set()  # of `call`, not begun
        self._rooms: set[Room] = set()
        self._accepting = False
        self._ending = False  # the grace of `close` is over, or the thread has died: rooms are worth nothing any more
        self._stopping = False
        self._error: HeadstartError | None = None
        self._busy_s = 0.0  # engine time since the last request completed
        self._place_s = 0.0  # engine time that what takes one place takes, a running mean
        self._thread = threading.Thread(target=self._run, name=thread, daemon=True)

    def start(self) -> None:
        self._accepting = True
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Accepting requests: started, not closed, and the thread lives."""
        return self._accepting

    @property
    def ended(self) -> bool:
        """No thread runs the engine: any more, or yet."""
        return not self._thread.is_alive()

    @property
    def stats(self) -> Stats:
        with self._condition:
            started = sum(mailbox.started for mailbox in self._live.values())
            return Stats(started, len(self._live) - started)

    def waiting(self) -> list[tuple[Request, float]]:
        """Live requests that have not started, and since when they wait (time.monotonic())."""
        with self._condition:
            return [(mailbox.request, mailbox.since) for mailbox in self._live.values() if not mailbox.started]

    @contextlib.contextmanager
    def room(self, places: int) -> Iterator[Room]:
        """Room in the queue for a request that is still being made ready: what that costs is for accepted ones only.

        Raises BusyError and UnavailableError as `submit`.
        """
        with self._condition:
            self._check(places)
            self._waiting += places
            room = Room(places)
            self._rooms.add(room)
        try:
            yield room
        finally:
            with self._condition:
                self._give_back(room)

    def submit(self, request: R_contra, room: Room | None = None) -> RequestStream:
        """Accept a request. Called from a running event loop, the one that reads the stream.

        Args:
            room: what was kept for the request; it takes its place.

        Raises:
            BusyError: more than `max_waiting` places would be taken.
            ConflictError: a request with this id is live.
            UnavailableError: not started, closing, or the engine's thread has died.
        """
        mailbox = Mailbox(request, asyncio.get_running_loop())
        with self._condition:
            kept = room is not None and room in self._rooms and not self._ending
            if room is not None:
                self._give_back(room)
            if not kept:
                self._check(request.n)
            if request.id in self._live:
                raise ConflictError(f"request_id: {request.id!r} is in progress already", param="request_id")
            self._live[request.id] = mailbox
            self._waiting += request.n
            self._commands.append(lambda: self._add(request))
            self._condition.notify()
        return RequestStream(mailbox, self._abort)

    def _check(self, places: int) -> None:
        """Raise unless so many places are free."""
        if not self._accepting:
            raise self._error or UnavailableError("the engine is not running")
        excess = self._waiting + places - self._max_waiting
        if excess > 0:
            message = f"the queue is full: at most {self._max_waiting} {self._noun} wait"
            raise BusyError(message, retry_after=self._pause(excess))

    def _give_back(self, room: Room) -> None:
        self._waiting -= room.places
        room.places = 0
        self._rooms.discard(room)

    def _pause(self, places: int) -> int:
        """Whole seconds in which so many places should become free."""
        return min(MAX_RETRY_AFTER_S, math.ceil(places * self._place_s))

    async def call(self, function: Callable[[], T]) -> T:
        """The result of a function that the engine's thread calls between two steps.

        Raises what the function does, and UnavailableError where no thread is left to call it.
        """
        future: Future[T] = Future()

        def command() -> None:
            self._calls.discard(future)
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._condition:
            if not self._accepting:
                raise self._error or UnavailableError("the engine is not running")
            self._calls.add(future)
            self._commands.append(command)
            self._condition.notify()
        return await asyncio.shield(asyncio.wrap_future(future))

    def wake(self) -> None:
        """The engine has work that no request brought. From any thread."""
        with self._condition:
            self._condition.notify()

    def _abort(self, mailbox: Mailbox) -> None:
        """From any thread; nothing happens when the mailbox's request has ended."""
        request_id = mailbox.request.id
        with self._condition:
            if self._live.get(request_id) is mailbox:
                self._commands.append(lambda: self._engine.abort(request_id))
                self._condition.notify()

    async def close(self, grace_s: float) -> None:
        """Accept nothing more, let live requests finish for `grace_s` seconds, cancel the rest, end the thread.

        Those that have room are as good as accepted.
        """
        with self._condition:
            self._accepting = False
        await self._drained(grace_s)
        with self._condition:
            self._ending = True
            mailboxes = list(self._live.values())
        for mailbox in mailboxes:
            self._abort(mailbox)
        await self._drained(ABORT_S)
        with self._condition:
            self._stopping = True
            stuck = list(self._live)
            self._condition.notify()
        if stuck:  # the thread is in a tick that does not end; it dies with the process
            log.error("the engine did not stop; %d requests are cancelled without it", len(stuck))
            self._deliver([Cancelled(request_id, Timings()) for request_id in stuck])
        elif self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    async def _drained(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (self._live or (self._rooms and not self._ending)) and time.monotonic() < end:
            await asyncio.sleep(0.01)

    # The engine's thread.

    def _run(self) -> None:
        try:
            with self._around():
                self._work()
        except BaseException as error:
            log.exception("the engine's thread died")
            self._die(error)
        finally:
            for future in self._calls:
                future.set_exception(self._error or UnavailableError("the engine is not running"))

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._commands or self._stopping or self._engine.has_work())
                commands, self._commands = self._commands, []
                if self._stopping:
                    return
            for command in commands:
                command()
            begun = time.monotonic()
            events = self._engine.step() if self._engine.has_work() else []
            self._busy_s += time.monotonic() - begun
            self._deliver(events)

    def _add(self, request: R_contra) -> None:
        try:
            self._engine.add(request)
        except Exception as error:
            if not isinstance(error, HeadstartError):
                log.exception("request %s could not be added", request.id)
                error = HeadstartError("the request could not be started")
            self._deliver([Failed(request.id, error, Timings())])

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            with self._condition:
                mailbox = self._live.get(event.request_id)
                if mailbox is None:
                    continue
                self._count(mailbox, event)
            if not mailbox.put(event):
                self._abort(mailbox)

    def _count(self, mailbox: Mailbox, event: Event) -> None:
        places = mailbox.request.n
        if isinstance(event, Started):
            mailbox.started = True
            self._waiting -= places
        if is_terminal(event):
            del self._live[event.request_id]
            if not mailbox.started:
                self._waiting -= places
        if isinstance(event, Completed):
            self._pace(places)

    def _pace(self, places: int) -> None:
        sample = self._busy_s / places
        self._place_s = sample if self._place_s == 0.0 else 0.8 * self._place_s + 0.2 * sample
        self._busy_s = 0.0

    def _die(self, error: BaseException) -> None:
        cause = UnavailableError(f"the engine has stopped: {type(error).__name__}", code="engine_dead")
        with self._condition:
            self._accepting = False
            self._ending = True
            self._error = cause
        try:
            self._deliver(self._engine.fail_all(cause))
        except Exception:
            log.exception("the engine could not end its requests")
        with self._condition:
            left = list(self._live)
        self._deliver([Failed(request_id, cause, Timings()) for request_id in left])
