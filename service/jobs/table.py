"""The jobs of one process: found by id or by the client's own name for the request, and forgotten in time.

A job that has ended is kept for `ttl_s` seconds and as long as all that have ended fit in the budget. The one that
ended first goes first, and the last always stays. The last `MAX_GONE` ids that went are known as gone.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from service.diffusion.request import State
from service.errors import ConflictError, GoneError, HeadstartError, NotFoundError
from service.jobs.ticket import Ticket

T = TypeVar("T")
MAX_GONE = 100_000
TICKET_BYTES = 1 << 15  # what a job without pictures is counted as: prompts of 2000 characters, and its own objects


class Table(Generic[T]):
    """Used from the event loop only.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, ttl_s: float, budget_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._budget = budget_bytes
        self._clock = clock
        self._tickets: dict[str, Ticket[T]] = {}
        self._names: dict[tuple[str, str], Ticket[T]] = {}  # by tenant and the client's name
        self._ended: deque[tuple[float, Ticket[T]]] = deque()  # by the time when they ended
        self._bytes = 0  # of these
        self._gone: OrderedDict[str, str] = OrderedDict()  # id to tenant

    def open(self, tenant: str, name: str | None, fields: Mapping[str, str]) -> Ticket[T]:
        """A new job, queued. Where there is a name, `named` has found none that has it."""
        ticket: Ticket[T] = Ticket(uuid.uuid4().hex, tenant, name, fields, time.time())
        self._tickets[ticket.id] = ticket
        if name is not None:
            self._names[tenant, name] = ticket
        return ticket

    def named(self, tenant: str, name: str, fields: Mapping[str, str]) -> Ticket[T] | None:
        """The tenant's job of this name. Raises ConflictError when something else was asked for under it."""
        self._forget_old()
        ticket = self._names.get((tenant, name))
        if ticket is None or ticket.fields == fields:
            return ticket
        different = next(key for key in {**fields, **ticket.fields} if fields.get(key) != ticket.fields.get(key))
        message = f"request_id: {name!r} was sent before with another {different}; each request needs an id of its own"
        raise ConflictError(message, param="request_id", code="request_id_reused")

    def get(self, tenant: str, id: str) -> Ticket[T]:
        """The tenant's job of this id. Raises NotFoundError, and GoneError for one that was forgotten."""
        self._forget_old()
        ticket = self._tickets.get(id)
        if ticket is not None and ticket.tenant == tenant:
            return ticket
        shown = id if len(id) <= 80 else id[:80] + "..."
        if self._gone.get(id) == tenant:
            kept = f"results are kept for {self._ttl_s:g} s and while they fit in {self._budget} bytes"
            raise GoneError(f"job: {shown!r} is gone; {kept}", param="job", code="job_gone")
        raise NotFoundError(f"job: {shown!r} is not known", param="job", code="job_not_found")

    def end(
        self,
        ticket: Ticket[T],
        state: State,
        *,
        result: T | None = None,
        error: HeadstartError | None = None,
        size: int = 0,
    ) -> None:
        """The job's last state, and what there is to tell. `size`: bytes of the result."""
        ticket.end(state, result, error, size + TICKET_BYTES)
        self._ended.append((self._clock(), ticket))
        self._bytes += ticket.size
        self._forget_old()

    def refuse(self, ticket: Ticket[T], error: HeadstartError) -> None:
        """The job was not accepted, and has never been."""
        ticket.refused = True
        ticket.end(State.FAILED, error=error)
        del self._tickets[ticket.id]
        self.unname(ticket)

    def unname(self, ticket: Ticket[T]) -> None:
        """Whoever sends its name again asks for a new job."""
        if ticket.name is not None and self._names.get((ticket.tenant, ticket.name)) is ticket:
            del self._names[ticket.tenant, ticket.name]

    def counts(self) -> dict[State, int]:
        """Jobs by state."""
        self._forget_old()
        found = Counter(ticket.state for ticket in self._tickets.values())
        return {state: found[state] for state in State}

    def _forget_old(self) -> None:
        expired = self._clock() - self._ttl_s
        while self._ended:
            ended, ticket = self._ended[0]
            if ended > expired and (self._bytes <= self._budget or len(self._ended) == 1):
                return
            self._ended.popleft()
            self._bytes -= ticket.size
            del self._tickets[ticket.id]
            self.unname(ticket)
            self._gone[ticket.id] = ticket.tenant
            if len(self._gone) > MAX_GONE:
                self._gone.popitem(last=False)
