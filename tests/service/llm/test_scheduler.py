from __future__ import annotations

import pytest

from service.errors import InputError
from service.llm.request import LlmRequest, Sequence, State
from service.llm.scheduler import Batch, Policy
from tests.service.llm.world import EOS, World, ask


def one(sequence: Sequence) -> int:
    return 1


def chunks(batch: Batch | None) -> list[tuple[str, int, int]]:
    assert batch is not None
    return [(chunk.sequence.request.id, chunk.start, chunk.count) for chunk in batch.chunks]


def policy(**changes) -> Policy:
    return Policy(**{"max_running": 4, "max_batch_tokens": 8, **changes})


def test_a_prompt_is_read_in_chunks_beside_those_that_generate():
    world = World(policy=policy())
    world.add(ask("short", (1, 2, 3)))
    world.add(ask("long", tuple(range(20))))
    assert chunks(world.step(one)) == [("short", 0, 3), ("long", 0, 5)]
    assert chunks(world.step(one)) == [("short", 3, 1), ("long", 5, 7)]
    batch = world.step(one)
    assert batch is not None
    assert batch.decodes == 1
    assert [sequence.request.id for sequence in batch.outputs] == ["short"]
    assert chunks(world.step(one)) == [("short", 5, 1), ("long", 19, 1)]


def test_the_last_token_of_a_prompt_alone_counts_as_one_that_generates():
    world = World(policy=policy(max_batch_tokens=7))
    world.add(ask("a", tuple(range(8))))
    world.step(one)
    batch = world.step(one)
    assert batch is not None
    assert (chunks(batch), batch.decodes) == ([("a", 7, 1)], 1)


def test_a_choice_ends_at_its_length_at_the_end_mark_and_when_told():
    world = World(policy=policy())
    long, marked, deaf, told = (
        world.add(ask("long", max_tokens=2)),
        world.add(ask("marked", max_tokens=9)),
        world.add(ask("deaf", (4,), max_tokens=2, params={"ignore_eos": True})),
        world.add(ask("told", (5,), max_tokens=9)),
    )
    world.step(one)
    world.scheduler.finish(told.sequences[0], "stop")
    world.step(lambda sequence: EOS if sequence.request.id in ("marked", "deaf") else 1)
    reasons = {job.request.id: (job.sequences[0].reason, job.usage.completion) for job in (long, marked, deaf, told)}
    assert reasons == {"long": ("length", 2), "marked": ("stop", 2), "deaf": ("length", 2), "told": ("stop", 1)}
    assert sorted(world.done) == ["deaf", "long", "marked", "told"]


def test_a_stop_string_in_the_last_token_is_the_reason():
    world = World(policy=policy())
    job = world.add(ask("x", max_tokens=1))
    batch = world.scheduler.schedule(0.0)
    assert batch is not None
    world.scheduler.commit(batch, [1])
    world.scheduler.finish(job.sequences[0], "stop")
    assert world.scheduler.collect().sequences[0].reason == "stop"


def test_choices_share_the_prompts_pages_and_copy_the_last_one_when_they_write_to_it():
    world = World(size=4, radix=False, policy=policy())
    job = world.add(ask("x", (1, 2, 3, 4, 5), n=3))
    batch = world.step(one)
    assert batch is not None
    assert batch.outputs == job.sequences
    assert world.pool.free == world.pool.pages - 2
    batch = world.step(one)
    assert batch is not None
    assert len(batch.moves.copies) == 2  # the last to write has the page alone
    assert world.pool.free == world.pool.pages - 4
    world.drain()
    assert world.pool.free == world.pool.pages


def test_choices_in_a_space_that_shares_nothing_each_read_the_prompt():
    world = World("virtual", policy=policy(max_batch_tokens=20))
    world.add(ask("x", n=3))
    assert chunks(world.step(one)) == [("x", 0, 3)] * 3
    assert world.started == ["x"]
    world.drain()
    assert len(world.ended) == 3


def test_seeds_follow_the_choice_and_wrap_around():
    world = World(policy=policy())
    job = world.add(ask("x", n=2, params={"seed": 2**32 - 1}))
    assert [sequence.seed for sequence in job.sequences] == [2**32 - 1, 0]


def test_a_known_prefix_is_not_computed_again_even_inside_a_page():
    world = World(size=4, policy=policy(max_batch_tokens=20))
    world.add(ask("a", (1, 2, 3, 4, 5, 6, 7), 1))
    world.drain(token=one)
    job = world.add(ask("b", (1, 2, 3, 4, 5, 6, 8, 9), 1))
    batch = world.step(one)
    assert batch is not None
    assert chunks(batch) == [("b", 6, 2)]
    assert len(batch.moves.copies) == 1
    assert job.usage.cached == 6
    assert (world.scheduler.prompt_tokens, world.scheduler.cached_tokens) == (15, 6)


def test_the_same_prompt_again_computes_its_last_token():
    world = World(policy=policy())
    for id in "ab":
        world.add(ask(id, (1, 2, 3, 4, 5), 1))
        world.drain(token=one)
    assert world.scheduler.cached_tokens == 4


def test_a_prompt_is_found_as_soon_as_it_is_read():
    world = World(size=4, policy=policy())
    world.add(ask("a", (1,) * 8, 30))
    world.step(one)
    world.add(ask("b", (1,) * 8, 30))
    assert ("b", 7, 1) in chunks(world.step(one))


def test_the_same_prompt_read_twice_at_once_is_held_once():
    world = World(size=4, policy=policy(max_batch_tokens=16))
    jobs = [world.add(ask(id, (1,) * 8)) for id in "ab"]
    world.step(one)
    assert jobs[0].sequences[0].pages == jobs[1].sequences[0].pages
    assert world.pool.free == world.pool.pages - 2


@pytest.mark.parametrize(("preemption", "places"), [("recompute", 0), ("swap", 8), ("swap", 1)])
def test_when_memory_is_short_the_last_one_makes_way_and_comes_back(preemption: str, places: int):
    world = World(pages=5, size=4, radix=False, places=places, policy=policy(preemption=preemption))
    first = world.add(ask("first", (1,) * 7, 12, params={"ignore_eos": True}))
    second = world.add(ask("second", (2,) * 6, 12, params={"ignore_eos": True}))
    while not world.scheduler.preemptions:
        batch = world.step(one)
    assert batch is not None
    kept = preemption == "swap" and places >= 2
    assert second.sequences[0].state is (State.SWAPPED if kept else State.PREEMPTED)
    assert second.sequences[0].computed == (8 if kept else 0)
    assert len(batch.moves.swap_outs) == (2 if kept else 0)
    assert first.sequences[0].state is State.RUNNING
    world.drain(token=one)
    assert world.done == ["first", "second"]
    assert second.usage.completion == 12


def test_no_one_comes_in_before_those_that_were_preempted():
    world = World(pages=5, size=4, radix=False, policy=policy())
    for id, tokens in (("first", (1,) * 7), ("second", (2,) * 6)):
        world.add(ask(id, tokens, 12, params={"ignore_eos": True}))
    while not world.scheduler.preemptions:
        world.step(one)
    world.add(ask("third", (3,), 1))
    world.drain(token=one)
    assert world.started == ["first", "second", "third"]
    assert world.done.index("third") > world.done.index("first")


def test_the_longest_known_prefix_comes_first_and_equals_in_turn():
    world = World(size=2, policy=policy(max_running=1))
    world.add(ask("known", (1, 2, 3, 4), 1))
    world.drain(token=one)
    world.add(ask("cold", (8, 8), 1))
    world.add(ask("cold too", (9, 9), 1))
    world.add(ask("half", (1, 2, 7, 7), 1))
    world.add(ask("whole", (1, 2, 3, 4), 1))
    world.drain(token=one)
    assert world.started[1:] == ["whole", "half", "cold", "cold too"]


def test_first_come_first_served_looks_at_no_prefix():
    world = World(size=2, policy=policy(max_running=1, order="fcfs"))
    for id, tokens in (("known", (1, 2, 3)), ("cold", (8, 8)), ("whole", (1, 2, 3))):
        world.add(ask(id, tokens, 1))
    world.drain(token=one)
    assert world.started == ["known", "cold", "whole"]


def test_a_point_of_priority_is_worth_the_ageing_time():
    world = World(policy=policy(max_running=1, order="fcfs", ageing_s=2.0))
    world.add(ask("first", max_tokens=5, params={"ignore_eos": True}))
    world.step(one)
    world.add(ask("plain", (4,), 1))
    world.step(one)
    world.add(ask("urgent", (5,), 1, priority=1))  # arrives one second later, which is less than a point
    world.step(one)
    world.step(one)
    world.add(ask("late", (6,), 1, priority=1))  # three seconds later: more than a point
    world.drain(token=one)
    assert world.started == ["first", "urgent", "plain", "late"]


def test_a_static_batch_lets_no_one_in_until_all_have_ended():
    world = World(policy=policy(mode="static"))
    world.add(ask("short", (1, 2, 3, 4, 5), 1))
    world.add(ask("long", (6, 7, 8, 9, 1), 4))
    world.step(one)
    world.add(ask("late", (3,), 1))
    assert world.done == ["short"]
    assert chunks(world.step(one)) == [("long", 3, 2)]
    world.drain(token=one)
    assert world.done == ["short", "long", "late"]
    assert world.now == 6.0


def test_a_request_level_batch_is_told_of_when_all_have_ended():
    world = World(policy=policy(mode="request"))
    world.add(ask("short", max_tokens=1))
    world.add(ask("long", max_tokens=3))
    world.step(one)
    world.step(one)
    assert world.done == []
    world.step(one)
    assert world.done == ["short", "long"]


def test_a_reserved_space_admits_by_the_longest_that_a_sequence_may_become():
    world = World("reserved", pages=4, size=4, policy=policy())
    world.add(ask("a", (1,), 7))
    world.add(ask("b", (1,), 8))
    batch = world.step(one)
    assert chunks(batch) == [("a", 0, 1)]
    world.drain()
    assert world.done == ["a", "b"]


def test_a_cancelled_request_gives_its_memory_back_at_once():
    world = World(radix=False, policy=policy())
    job = world.add(ask("x", (1,) * 20, n=2))
    other = world.add(ask("y"))
    world.step(one)
    world.scheduler.end(job, State.CANCELLED)
    assert world.pool.free == world.pool.pages
    assert {sequence.state for sequence in job.sequences} == {State.CANCELLED}
    assert list(world.scheduler.jobs.values()) == [other]
    world.drain()


@pytest.mark.parametrize(("state", "found"), [(State.FAILED, 0), (State.CANCELLED, 8)])
def test_what_a_failed_request_was_computing_is_not_found_again(state: State, found: int):
    world = World(policy=policy())
    job = world.add(ask("x", (1,) * 12))
    world.step(one)  # 8 tokens of the prompt
    world.scheduler.end(job, state)
    again = world.add(ask("again", (1,) * 12))
    world.drain(token=one)
    assert again.usage.cached == found


def test_deadlines_are_found_in_their_order():
    world = World(policy=policy())
    jobs = {id: world.add(ask(id, deadline_s=limit)) for id, limit in (("b", 5.0), ("a", 2.0), ("none", None))}
    assert world.scheduler.expired(1.9) == []
    assert world.scheduler.expired(2.0) == [jobs["a"]]
    assert world.scheduler.expired(9.0) == [jobs["a"], jobs["b"]]
    world.scheduler.end(jobs["a"], State.FAILED)
    assert world.scheduler.expired(9.0) == [jobs["b"]]


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        (ask("x", (1,) * 256, 1), "prompt", "the prompt has 256 tokens; at most 255 are allowed"),
        (ask("x", (1,) * 250, 7), "max_tokens", "at most 6: the prompt has 250 tokens of 256"),
        (ask("x", n=5), "n", "at most 4"),
    ],
)
def test_what_can_never_run_is_refused(request_: LlmRequest, param: str, message: str):
    world = World(policy=policy())
    with pytest.raises(InputError, match=message) as caught:
        world.add(request_)
    assert caught.value.param == param
    assert not world.scheduler.jobs


def test_an_id_is_live_once():
    world = World(policy=policy())
    world.add(ask("x"))
    with pytest.raises(ValueError, match="x is live already"):
        world.add(ask("x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"max_running": 0}, "max_running is 0"), ({"max_batch_tokens": 3}, "at least max_running, which is 4"),
     ({"ageing_s": -1.0}, "ageing_s is -1.0")],
)  # fmt: skip
def test_policies_out_of_range_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        policy(**changes)
