from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from accel.samplers.plans import Plan, Row
from service.diffusion.picture import Bucket, Job, Picture
from service.diffusion.request import ImageRequest, State
from service.diffusion.scheduler import Scheduler

SMALL, LARGE = Bucket("base", (2, 4, 4), ()), Bucket("base", (2, 8, 8), ())
BUCKETS = [SMALL, LARGE, Bucket("base", (2, 4, 4), (("ink", 1.0),)), Bucket("lcm", (2, 4, 4), ())]
AGEING_S = 10.0


@dataclass(frozen=True)
class FakeCondition:
    evaluations: int


class FakeSlots:
    """Numbers slots from 0 in each shape, and knows who holds what."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: set[tuple[tuple[int, int, int], int]] = set()
        self.broken = False

    @property
    def free(self) -> int:
        return self.limit - len(self.held)

    def acquire(self, shape: tuple[int, int, int]) -> int:
        if self.broken:
            raise MemoryError("no room")
        slot = next(slot for slot in range(self.limit) if (shape, slot) not in self.held)
        self.held.add((shape, slot))
        return slot

    def release(self, shape: tuple[int, int, int], slot: int) -> None:
        self.held.remove((shape, slot))


def plan(rows: int) -> Plan:
    return Plan("ddim", (Row(t=1.0, alpha=0.5, a=1.0, b=0.0, c=0.0, s=0.0),) * rows, 1.0)


def ask(id: str, **changes) -> ImageRequest:
    fields = {
        "prompt": "x", "negative_prompt": "", "n": 1, "width": 64, "height": 64, "steps": 1, "guidance_scale": 1.0,
        "sampler": "ddim", "eta": 0.0, "seed": 0,
    }  # fmt: skip
    return ImageRequest(id=id, **{**fields, **changes})


def scheduler(max_batch: int = 4, slots: int = 8) -> Scheduler:
    return Scheduler(max_batch, AGEING_S, FakeSlots(slots))


def put(
    to: Scheduler, id: str, now: float = 0.0, *, rows: int = 3, bucket: Bucket = SMALL, evaluations: int = 1, **changes
) -> Job:
    job = to.add(ask(id, **changes), plan(rows), bucket, now)
    to.attach(job, FakeCondition(evaluations))
    return job


def names(pictures: list[Picture]) -> list[str]:
    return [picture.request.id for picture in pictures]


def tick(of: Scheduler, now: float = 0.0) -> list[str]:
    """Admit, run and decode; the ids of the rows that ran."""
    of.admit(now)
    chosen = of.schedule(now)
    assert chosen is not None
    of.commit(chosen.pictures)
    for picture in of.to_decode(100):
        of.complete(picture)
    return names(chosen.pictures)


def test_equal_requests_are_served_in_order_of_arrival():
    queue = scheduler(slots=2)
    for id in "abcd":
        put(queue, id, now=5.0)
    assert names(queue.admit(5.0).pictures) == ["a", "b"]


def test_a_higher_priority_goes_first_until_the_other_has_aged():
    queue = scheduler(slots=1)
    put(queue, "old", now=0.0)
    put(queue, "urgent", now=AGEING_S * 2 - 1, priority=2)
    put(queue, "late", now=AGEING_S * 2 + 1, priority=2)
    order = []
    while queue.jobs:
        for picture in queue.admit(50.0).pictures:
            order.append(picture.request.id)
            queue.end(queue.jobs[picture.request.id], State.CANCELLED)
    assert order == ["urgent", "old", "late"]


def test_a_guided_row_takes_two_places():
    queue = scheduler(max_batch=4)
    put(queue, "a", evaluations=2)
    put(queue, "b", evaluations=1)
    put(queue, "c", evaluations=2)
    put(queue, "d", evaluations=1)
    assert tick(queue) == ["a", "b", "d"]


def test_a_guided_row_alone_runs_even_in_a_batch_of_one():
    queue = scheduler(max_batch=1)
    put(queue, "a", evaluations=2)
    assert tick(queue) == ["a"]


def test_rows_at_different_steps_share_a_tick_and_buckets_do_not():
    queue = scheduler()
    put(queue, "a", rows=3)
    assert tick(queue) == ["a"]
    put(queue, "b", rows=5)
    assert tick(queue) == ["a", "b"]
    put(queue, "c", bucket=LARGE)
    ticks = [tick(queue) for _ in range(4)]
    assert ["c"] in ticks
    assert not [rows for rows in ticks if "c" in rows and len(rows) > 1]


def test_a_stream_of_one_resolution_does_not_starve_another():
    queue = scheduler(max_batch=2, slots=8)
    for i in range(100):
        put(queue, f"small-{i}", rows=4)
    for _ in range(100):  # two small pictures leave every fourth tick; the large one arrives in the middle of it
        tick(queue)
    put(queue, "large", rows=10, bucket=LARGE)
    ticks = []
    while "large" in queue.jobs:
        ticks.append(tick(queue))
    begun = ticks.index(["large"])
    assert ticks[begun::2] == [["large"]] * 10  # two lanes of equal priority take turns


def test_a_lane_of_high_priority_does_not_starve_another():
    queue = scheduler(slots=2)
    put(queue, "urgent", rows=1000, priority=3)
    put(queue, "patient", rows=1000, bucket=LARGE)
    second = [now for now in range(200) if tick(queue, float(now)) == ["patient"]]
    gaps = [after - before for before, after in itertools.pairwise(second)]
    assert gaps
    assert max(gaps) <= 3 * AGEING_S + 2


def test_a_picture_knows_its_seed_modulo_two_to_the_32():
    queue = scheduler()
    job = put(queue, "a", n=3, seed=2**32 - 2)
    assert [picture.seed for picture in job.pictures] == [2**32 - 2, 2**32 - 1, 0]


def test_a_slot_that_cannot_be_had_is_told_and_loses_nothing():
    slots = FakeSlots(4)
    queue = Scheduler(4, AGEING_S, slots)
    job = put(queue, "a")
    slots.broken = True
    admitted, refused = queue.admit(0.0)
    assert not admitted
    assert refused is not None
    assert refused[0] is job.pictures[0]
    queue.end(job, State.FAILED)
    assert queue.schedule(0.0) is None
    assert not slots.held


def test_a_live_id_is_refused():
    queue = scheduler()
    put(queue, "a")
    with pytest.raises(ValueError, match="live already"):
        put(queue, "a")


class Traffic(RuleBasedStateMachine):
    """Random arrivals, aborts, failures, deadlines and ticks."""

    MAX_BATCH, SLOTS = 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.slots = FakeSlots(self.SLOTS)
        self.scheduler = Scheduler(self.MAX_BATCH, AGEING_S, self.slots)
        self.now = 0.0
        self.accepted: list[Job] = []
        self.ended: dict[str, State] = {}

    def _end(self, job: Job, state: State) -> None:
        assert job.request.id not in self.ended
        self.scheduler.end(job, state)
        self.ended[job.request.id] = state

    @rule(
        n=st.integers(1, 4),
        rows=st.integers(1, 5),
        bucket=st.sampled_from(BUCKETS),
        evaluations=st.integers(1, 2),
        priority=st.integers(-10, 10),
        deadline_s=st.none() | st.floats(0.5, 20.0),
    )
    def arrive(self, n, rows, bucket, evaluations, priority, deadline_s):
        id = str(len(self.accepted))
        self.accepted.append(
            put(
                self.scheduler, id, self.now, rows=rows, bucket=bucket, evaluations=evaluations,
                n=n, priority=priority, deadline_s=deadline_s,
            )
        )  # fmt: skip

    @precondition(lambda self: self.scheduler.jobs)
    @rule(data=st.data(), state=st.sampled_from([State.CANCELLED, State.FAILED]))
    def interrupt(self, data, state):
        id = data.draw(st.sampled_from(sorted(self.scheduler.jobs)))
        self._end(self.scheduler.jobs[id], state)

    @rule(seconds=st.floats(0.0, 10.0))
    def wait(self, seconds):
        self.now += seconds
        late = {id for id, job in self.scheduler.jobs.items() if self._deadline(job) <= self.now}
        expired = self.scheduler.expired(self.now)
        assert {job.request.id for job in expired} == late
        for job in expired:
            self._end(job, State.FAILED)

    @staticmethod
    def _deadline(job: Job) -> float:
        return float("inf") if job.request.deadline_s is None else job.arrived + job.request.deadline_s

    @rule(half=st.booleans(), decode=st.integers(0, 3))
    def step(self, half, decode):
        self.scheduler.admit(self.now)
        chosen = self.scheduler.schedule(self.now)
        if chosen is None:
            assert not any(
                picture.state is State.IN_PROGRESS and not picture.denoised
                for job in self.scheduler.jobs.values()
                for picture in job.pictures
            )
        else:
            assert {picture.bucket for picture in chosen.pictures} == {chosen.bucket}
            assert chosen.evaluations <= self.MAX_BATCH or len(chosen.pictures) == 1
            assert len(set(map(id, chosen.pictures))) == len(chosen.pictures)
            before = [picture.cursor for picture in chosen.pictures]
            advanced = chosen.pictures[: len(chosen.pictures) // 2 + 1] if half else chosen.pictures
            self.scheduler.commit(advanced)
            assert [picture.cursor for picture in advanced] == [cursor + 1 for cursor in before[: len(advanced)]]
        for picture in self.scheduler.to_decode(decode) if decode else []:
            if self.scheduler.complete(picture):
                id_ = picture.request.id
                assert id_ not in self.ended
                self.ended[id_] = State.COMPLETED

    @invariant()
    def slots_are_those_of_pictures_in_progress(self):
        running = [
            (picture.bucket.shape, picture.slot)
            for job in self.accepted
            for picture in job.pictures
            if picture.state is State.IN_PROGRESS
        ]
        assert len(set(running)) == len(running) <= self.SLOTS
        assert set(running) == self.slots.held

    @invariant()
    def live_or_ended_and_never_both(self):
        for job in self.accepted:
            assert (job.request.id in self.scheduler.jobs) != (job.request.id in self.ended)

    def teardown(self):
        """What is left finishes within as many ticks as there are rows, so nothing starves."""
        rows = sum(len(picture.plan) for job in self.accepted for picture in job.pictures)
        for _ in range(rows + 1):
            self.step(half=False, decode=100)
        for _ in self.accepted:  # one shape at a time
            self.step(half=False, decode=100)
        assert not self.scheduler.jobs
        assert not self.slots.held
        for job in self.accepted:
            outcome = self.ended[job.request.id]
            states = {picture.state for picture in job.pictures}
            assert states <= {State.COMPLETED, outcome}


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])
