"""The table of jobs against a plain model of it, with a clock that is moved by hand."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.diffusion.request import Progress, State
from service.errors import CancelledError, ConflictError, GoneError, HeadstartError, NotFoundError
from service.events import Started
from service.jobs.table import TICKET_BYTES, Table
from service.jobs.ticket import Ticket

TTL_S = 60.0
BUDGET = 10 * TICKET_BYTES
TENANTS = ("ann", "bob")
tenants = st.sampled_from(TENANTS)
names = st.sampled_from(["one", "two"])
bodies = st.sampled_from([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "n": "2"}])
ENDS = {
    State.COMPLETED: {"result": "a picture"},
    State.FAILED: {"error": HeadstartError("it overflowed")},
    State.CANCELLED: {"error": CancelledError("asked to")},
}


class TableMachine(RuleBasedStateMachine):
    """The model: every ticket that was accepted, in which order they ended, and by a plain rule what is kept."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.table: Table[str] = Table(TTL_S, BUDGET, lambda: self.now)
        self.tickets: list[Ticket[str]] = []
        self.states: dict[str, State] = {}
        self.ended: list[tuple[float, int, Ticket[str]]] = []  # when, size
        self.gone: set[str] = set()
        self.unnamed: set[str] = set()

    def live(self) -> list[Ticket[str]]:
        return [ticket for ticket in self.tickets if not self.states[ticket.id].terminal]

    def known(self) -> list[Ticket[str]]:
        """The rule, applied again from the beginning: the oldest goes while it is too old or all are too large."""
        while self.ended:
            at, _, ticket = self.ended[0]
            large = sum(size + TICKET_BYTES for _, size, _ in self.ended) > BUDGET and len(self.ended) > 1
            if at > self.now - TTL_S and not large:
                break
            self.ended.pop(0)
            self.gone.add(ticket.id)
        return [ticket for ticket in self.tickets if ticket.id not in self.gone]

    @rule(tenant=tenants, name=names | st.none(), body=bodies)
    def ask(self, tenant: str, name: str | None, body: dict[str, str]) -> None:
        same = [
            ticket
            for ticket in self.known()
            if name is not None and (ticket.tenant, ticket.name) == (tenant, name) and ticket.id not in self.unnamed
        ]
        if same and same[0].fields != body:
            with pytest.raises(
                ConflictError, match=r"request_id: '(one|two)' was sent before with another (prompt|n);"
            ):
                self.table.named(tenant, same[0].name or "", body)
            return
        found = None if name is None else self.table.named(tenant, name, body)
        assert found is (same[0] if same else None)
        if found is None:
            ticket = self.table.open(tenant, name, body)
            ticket.accept(2, 5, lambda: None)
            self.tickets.append(ticket)
            self.states[ticket.id] = State.QUEUED

    @rule(tenant=tenants, body=bodies)
    def be_refused(self, tenant: str, body: dict[str, str]) -> None:
        ticket = self.table.open(tenant, "refused", body)
        error = HeadstartError("the queue is full")
        self.table.refuse(ticket, error)
        assert ticket.refused
        assert ticket.ended.is_set()
        assert ticket.error is error
        assert self.table.named(tenant, "refused", body) is None
        with pytest.raises(NotFoundError):
            self.table.get(tenant, ticket.id)

    @rule(data=st.data(), step=st.integers(1, 5))
    def advance(self, data: st.DataObject, step: int) -> None:
        if self.live():
            ticket = data.draw(st.sampled_from(self.live()))
            ticket.note(Started(ticket.id))
            ticket.note(Progress(ticket.id, 1, step, 5))
            self.states[ticket.id] = State.IN_PROGRESS
            assert (ticket.steps_done, ticket.steps) == (step, 10)

    @rule(data=st.data(), state=st.sampled_from(list(ENDS)), size=st.integers(0, 2 * BUDGET))
    def end(self, data: st.DataObject, state: State, size: int) -> None:
        if self.live():
            ticket = data.draw(st.sampled_from(self.live()))
            self.table.end(ticket, state, size=size, **ENDS[state])  # type: ignore[arg-type]
            self.states[ticket.id] = state
            self.ended.append((self.now, size, ticket))
            assert ticket.ended.is_set()
            self.known()  # only the clock may take the last one that ended

    @rule(data=st.data())
    def unname(self, data: st.DataObject) -> None:
        if self.live():
            ticket = data.draw(st.sampled_from(self.live()))
            self.table.unname(ticket)
            self.unnamed.add(ticket.id)

    @rule(seconds=st.sampled_from([1.0, TTL_S / 2, TTL_S - 0.5, TTL_S, 3 * TTL_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def every_job_is_told_as_it_is_and_to_its_tenant_only(self) -> None:
        known = {ticket.id for ticket in self.known()}
        for ticket in self.tickets:
            other = TENANTS[1 - TENANTS.index(ticket.tenant)]
            with pytest.raises(NotFoundError):
                self.table.get(other, ticket.id)
            if ticket.id not in known:
                with pytest.raises(GoneError, match="kept for 60 s"):
                    self.table.get(ticket.tenant, ticket.id)
                continue
            assert self.table.get(ticket.tenant, ticket.id) is ticket
            assert ticket.state is self.states[ticket.id]
            assert (ticket.result is not None) == (ticket.state is State.COMPLETED)
            assert (ticket.error is not None) == (ticket.state in (State.FAILED, State.CANCELLED))

    @invariant()
    def the_counts_are_those_of_what_is_known(self) -> None:
        states = [self.states[ticket.id] for ticket in self.known()]
        assert self.table.counts() == {state: states.count(state) for state in State}


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_result_is_kept_for_its_time_and_no_longer() -> None:
    now = 0.0
    table: Table[str] = Table(TTL_S, BUDGET, lambda: now)
    ticket = table.open("ann", "one", {})
    now = 5.0
    table.end(ticket, State.COMPLETED, result="a picture")
    now = 4.9 + TTL_S
    assert table.get("ann", ticket.id) is ticket
    now = 5.0 + TTL_S
    with pytest.raises(GoneError):
        table.get("ann", ticket.id)
    assert table.named("ann", "one", {}) is None


def test_the_budget_bounds_what_is_kept_and_the_last_result_stays() -> None:
    table: Table[str] = Table(TTL_S, BUDGET, lambda: 0.0)
    tickets = [table.open("ann", None, {}) for _ in range(3)]
    for ticket in tickets:
        table.end(ticket, State.COMPLETED, result="large", size=2 * BUDGET)
    assert table.get("ann", tickets[2].id).result == "large"
    for ticket in tickets[:2]:
        with pytest.raises(GoneError, match=f"fit in {BUDGET} bytes"):
            table.get("ann", ticket.id)


def test_ids_that_have_gone_are_known_as_gone_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.table.MAX_GONE", 2)
    table: Table[str] = Table(TTL_S, 1, lambda: 0.0)
    tickets = [table.open("ann", None, {}) for _ in range(4)]
    for ticket in tickets:
        table.end(ticket, State.COMPLETED, result="a")
    with pytest.raises(NotFoundError):
        table.get("ann", tickets[0].id)
    for ticket in tickets[1:3]:
        with pytest.raises(GoneError):
            table.get("ann", ticket.id)


def test_a_cancel_before_acceptance_takes_effect_with_it() -> None:
    aborted: list[str] = []
    table: Table[str] = Table(TTL_S, BUDGET)
    ticket = table.open("ann", None, {})
    ticket.cancel()
    ticket.accept(1, 4, lambda: aborted.append("now"))
    assert aborted == ["now"]
    ticket.cancel()
    assert aborted == ["now", "now"]
    table.end(ticket, State.CANCELLED, error=CancelledError("asked to"))
    ticket.cancel()
    assert aborted == ["now", "now"]
