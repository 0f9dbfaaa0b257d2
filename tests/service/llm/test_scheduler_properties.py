"""Whatever arrives and leaves, and however small the memory is: every request ends, and every page comes back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from service.errors import InputError
from service.llm.request import LlmRequest, SamplingParams, Sequence, State
from service.llm.scheduler import AGED_SHARE, Policy
from tests.service.llm.world import EOS, World, ask

PREFIXES = [(), (1, 2, 1, 2, 1), (1, 2, 1, 2, 1, 1, 2, 2, 1), (2,) * 17]
MODES = ["continuous", "static", "request"]


@dataclass(frozen=True)
class Visit:
    """A request, and what happens to it."""

    arrives: int  # step
    prefix: tuple[int, ...]
    rest: tuple[int, ...]
    max_tokens: int
    n: int
    salt: str
    priority: int
    ignore_eos: bool
    leaves: int | None  # steps after its arrival at which it is cancelled
    fails: bool  # then its batch fails instead, after it was scheduled
    stops: int | None  # generated tokens of a choice at which a stop string is found


visits = st.builds(
    Visit,
    arrives=st.integers(0, 15),
    prefix=st.sampled_from(PREFIXES),
    rest=st.lists(st.integers(1, 2), min_size=1, max_size=12).map(tuple),
    max_tokens=st.integers(1, 14),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    salt=st.sampled_from(["", "", "tenant"]),
    priority=st.sampled_from([0, 0, -3, 5]),
    ignore_eos=st.booleans(),
    leaves=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    fails=st.booleans(),
    stops=st.one_of(st.none(), st.integers(1, 6)),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[World, list[Visit]]:
    """A load, and a world whose memory sometimes holds its longest sequence and nothing else."""
    load = draw(st.lists(visits, min_size=1, max_size=10))
    size = draw(st.integers(1, 5))
    longest = max(len(visit.prefix + visit.rest) + visit.max_tokens for visit in load)
    pages = -(-longest // size) + draw(st.integers(0, 8))
    running = draw(st.integers(3, 6))
    policy = Policy(
        mode=draw(st.sampled_from(MODES)),
        preemption=draw(st.sampled_from(["recompute", "swap"])),
        order=draw(st.sampled_from(["lpm", "fcfs"])),
        max_running=running,
        max_batch_tokens=running + draw(st.integers(0, 20)),
        ageing_s=draw(st.sampled_from([0.0, 3.0, 1000.0])),
    )
    world = World(
        draw(st.sampled_from(["paged", "paged", "paged", "reserved", "virtual"])),
        pages=pages,
        size=size,
        radix=draw(st.booleans()),
        places=draw(st.sampled_from([0, 5, 60])),
        slots=draw(st.integers(1, 4)),
        policy=policy,
        seed=draw(st.integers(0, 1000)),
    )
    return world, load


@given(cases())
@settings(max_examples=400, deadline=None)
def test_every_request_ends_and_every_page_comes_back(case: tuple[World, list[Visit]]):
    world, load = case
    visitors = {str(number): visit for number, visit in enumerate(load)}
    for step in range(5000):
        play(world, visitors, step)
        if step > 40 and not world.scheduler.jobs:
            break
    ended = {id for id, visit in visitors.items() if visit.leaves is not None}
    assert set(world.done) | ended == set(visitors)
    assert len(set(world.done)) == len(world.done)
    for sequence in world.ended:
        check_answer(sequence, visitors[sequence.request.id])
    if world.scheduler.preemptions:
        event(f"preempted in a {world.kind} space by {world.policy.preemption}")
    if world.scheduler.cached_tokens:
        event("found in memory")
    world.check_idle()


def play(world: World, visitors: dict[str, Visit], step: int) -> None:
    jobs = world.scheduler.jobs
    for id, visit in visitors.items():
        if visit.arrives == step:
            world.add(request_of(id, visit))
        if id in jobs and visit.leaves is not None and step >= visit.arrives + visit.leaves and not visit.fails:
            world.scheduler.end(jobs[id], State.CANCELLED)
            world.check()
    batch = world.scheduler.schedule(world.now)
    world.check()
    if batch is None:
        world.collect()  # in the mode "request": the last of a batch may have been cancelled
        assert not jobs, "there is work, but nothing is scheduled"
        world.now += 1.0
        return
    world.run(batch)
    for id, visit in visitors.items():
        if id in jobs and visit.leaves is not None and step >= visit.arrives + visit.leaves and visit.fails:
            world.scheduler.end(jobs[id], State.FAILED)
    outputs = batch.outputs
    world.scheduler.commit(batch, [world.random_token(sequence) for sequence in outputs])
    for sequence in outputs:
        if sequence.generated == visitors[sequence.request.id].stops:
            world.scheduler.finish(sequence, "stop")
    world.collect()
    world.check()
    world.now += 1.0


def request_of(id: str, visit: Visit) -> LlmRequest:
    params = SamplingParams(max_tokens=visit.max_tokens, ignore_eos=visit.ignore_eos)
    tokens = visit.prefix + visit.rest
    return LlmRequest(id=id, tokens=tokens, params=params, n=visit.n, salt=visit.salt, priority=visit.priority)


def check_answer(sequence: Sequence, visit: Visit) -> None:
    answer = sequence.tokens[len(visit.prefix + visit.rest) :]
    assert 1 <= len(answer) <= visit.max_tokens
    assert tuple(sequence.tokens[: -len(answer)]) == visit.prefix + visit.rest
    assert visit.ignore_eos or EOS not in answer[:-1]
    if sequence.reason == "length":
        assert len(answer) == visit.max_tokens
    else:
        assert sequence.reason == "stop"
        assert answer[-1] == EOS or len(answer) == visit.stops


@given(
    size=st.integers(1, 4),
    prompt=st.integers(1, 10),
    max_tokens=st.integers(1, 10),
    n=st.integers(1, 4),
    preemption=st.sampled_from(["recompute", "swap"]),
    before=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=10).map(tuple), max_size=4),
    seed=st.integers(0, 100),
)
@settings(max_examples=300, deadline=None)
def test_what_just_fits_runs_after_anything(
    size: int, prompt: int, max_tokens: int, n: int, preemption: str, before: list[tuple[int, ...]], seed: int
):
    """A pool that holds a single sequence of the request, all of it, while the tree holds other things."""
    tokens = (1, 2) * 10
    pages = -(-max(prompt + max_tokens, 11) // size)
    policy = Policy(preemption=preemption, max_running=4, max_batch_tokens=8)
    world = World("paged", pages, size, places=pages, policy=policy, seed=seed)
    for number, other in enumerate(before):
        world.add(ask(f"before {number}", other, 1))
    world.drain()
    world.add(ask("full", tokens[:prompt], max_tokens, n=n, params={"ignore_eos": True}))
    world.drain()
    assert world.done[-1] == "full"
    assert all(sequence.generated == max_tokens for sequence in world.ended[-n:])
    world.check_idle()


@given(
    seats=st.integers(1, 4),
    ageing=st.integers(0, 30),
    answer=st.integers(1, 6),
    crowd=st.integers(1, 3),
    pages=st.integers(12, 40),
)
@settings(max_examples=100, deadline=None)
def test_a_cold_request_starts_within_a_bound_among_endless_hits(
    seats: int, ageing: int, answer: int, crowd: int, pages: int
):
    assert started_after(seats, ageing, answer, crowd, pages) <= ageing + wait_bound(seats, crowd, answer)


def wait_bound(seats: int, crowd: int, answer: int) -> int:
    """Steps in which all that may come before it make way, even if one by one: those that run when it has aged, and the
    hits that arrived before it, with others in between. Each takes one step for each token of its answer, and
    perhaps another to be read."""
    return (seats + AGED_SHARE * (crowd + 1)) * (answer + 1)


def test_without_ageing_it_never_starts():
    with pytest.raises(AssertionError, match="never started"):
        started_after(seats=2, ageing=10**6, answer=4, crowd=2, pages=40)


def started_after(seats: int, ageing: int, answer: int, crowd: int, pages: int) -> float:
    """Seconds, of a step each, until a request without a cached prefix starts among others that have one."""
    policy = Policy(max_running=seats, max_batch_tokens=seats + 8, ageing_s=ageing)
    world = World(pages=pages, policy=policy)
    shared = (1, 2, 1, 2, 1, 2, 1, 2)
    world.add(ask("first", shared, 1))
    world.drain()
    arrived = world.now
    for step in range(400):
        for number in range(crowd):
            world.add(ask(f"hit {step} {number}", (*shared, 3 + number), answer, params={"ignore_eos": True}))
        if step == 0:
            cold = world.add(ask("cold", (8, 8, 8, 8), answer))
        world.step()
        if cold.started is not None:
            return cold.started - arrived
    raise AssertionError("the cold request never started")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30)), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_salts_never_share(asked: list[tuple[str, int]]):
    """Each tenant finds exactly what it would find alone."""
    together = World(pages=80, size=4)
    alone = {salt: World(pages=80, size=4) for salt in "abc"}
    for number, (salt, length) in enumerate(asked):
        for world in (together, alone[salt]):
            job = world.add(ask(str(number), (1,) * length, 1, salt=salt))
            world.drain(token=lambda sequence: 2)
            cached = job.usage.cached
            if world is together:
                found = cached
        assert found == cached


@given(prompt=st.integers(1, 60), max_tokens=st.integers(1, 60), pages=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("kind", ["paged", "reserved", "virtual"])
def test_what_is_accepted_runs_and_what_never_could_is_refused(kind: str, prompt: int, max_tokens: int, pages: int):
    world = World(kind, pages, 4, max_length=40)
    request = ask("x", (1,) * prompt, max_tokens, params={"ignore_eos": True})
    if prompt + max_tokens <= min(40, 4 * pages):
        world.add(request)
        world.drain()
        assert world.done == ["x"]
    else:
        with pytest.raises(InputError, match=f"has {prompt} tokens"):
            world.add(request)
        assert not world.scheduler.jobs
