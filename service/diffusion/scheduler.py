"""Which rows run next. Knows no torch, and is the only code that changes a picture's state.

    add -> waiting --admit--> running --schedule, commit--> denoised --complete--> completed
              |                  |                              |
              +------------------+------------ end -------------+--> failed, cancelled

A picture holds a latent slot from `admit` until `complete` or `end`.

One rule of age serves twice: waiting `ageing_s` is worth one point of priority. Waiting pictures are admitted in the
order of `arrived - priority * ageing_s`, which never changes while they wait, so a picture is overtaken only by those
that arrive within (difference in priority) * ageing_s after it. Running pictures stand in lanes, one a bucket; the lane
whose last tick is longest ago goes next, each point of its highest priority counting as `ageing_s` of waiting.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from accel.samplers.plans import Plan
from service.diffusion.picture import Bucket, Job, Key, Picture, Tick
from service.diffusion.request import ImageRequest, State
from service.diffusion.starts import Start
from service.events import MAX_SEED

if TYPE_CHECKING:
    from models.diffusion.model import Condition

T = TypeVar("T")


class Slots(Protocol):
    """Where latents live; `accel.memory.latents.LatentSlots` is one."""

    @property
    def free(self) -> int: ...
    def acquire(self, shape: tuple[int, int, int]) -> int: ...
    def release(self, shape: tuple[int, int, int], slot: int) -> None: ...


class Admission(NamedTuple):
    """Pictures that were given slots, and the one for which `acquire` failed, if any, with its error."""

    pictures: list[Picture]
    refused: tuple[Picture, Exception] | None


class Queue(Generic[T]):
    """Items in ascending order of distinct keys.

    A sorted list: finding a place takes O(log n) comparisons, and moving the pointers behind it is one memmove, which
    at the hundreds of items that queues here hold costs less than sifting a heap. Unlike a heap it forgets at once.
    """

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self._items: list[T] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def add(self, key: Key, item: T) -> None:
        at = bisect.bisect(self._keys, key)
        self._keys.insert(at, key)
        self._items.insert(at, item)

    def remove(self, key: Key) -> None:
        at = bisect.bisect_left(self._keys, key)
        assert self._keys[at] == key
        del self._keys[at], self._items[at]

    def first(self) -> T:
        return self._items[0]


@dataclass(slots=True, eq=False)
class Lane:
    """The running pictures of one bucket."""

    served: float  # when its last tick was chosen; at first, when the lane came to be
    tick: int  # number of that tick, which tells lanes apart on a coarse clock
    rows: Queue[Picture] = field(default_factory=Queue)


class Scheduler:
    """Queues, lanes and slots.

    Args:
        max_batch: network rows of one tick: a guided picture takes two of them, any other one. A guided picture alone
            runs even when max_batch is 1.
        ageing_s: seconds of waiting that are worth one point of priority.
        slots: latent slots, which bound the pictures that run.
    """

    def __init__(self, max_batch: int, ageing_s: float, slots: Slots) -> None:
        self.jobs: dict[str, Job] = {}
        self._max_batch = max_batch
        self._ageing_s = ageing_s
        self._slots = slots
        self._waiting: Queue[Picture] = Queue()
        self._lanes: dict[Bucket, Lane] = {}
        self._denoised: Queue[Picture] = Queue()
        self._deadlines: Queue[Job] = Queue()
        self._arrivals = 0
        self._ticks = 0

    def add(self, request: ImageRequest, plan: Plan, bucket: Bucket, now: float) -> Job:
        """Queue the pictures of a request; its id must not be that of a live one."""
        if request.id in self.jobs:
            raise ValueError(f"request {request.id} is live already")
        turn = (now - request.priority * self._ageing_s, self._arrivals)
        self._arrivals += 1
        pictures = [
            Picture(request, index, (request.seed + index) % (MAX_SEED + 1), plan, bucket, (*turn, index))
            for index in range(request.n)
        ]
        job = self.jobs[request.id] = Job(request, pictures, now, turn)
        for picture in pictures:
            self._waiting.add(picture.turn, picture)
        if request.deadline_s is not None:
            self._deadlines.add((now + request.deadline_s, turn[1]), job)
        return job

    def expired(self, now: float) -> list[Job]:
        """Requests whose deadline has passed."""
        late = []
        for job in self._deadlines:
            if job.arrived + (job.request.deadline_s or 0.0) > now:
                break
            late.append(job)
        return late

    def admit(self, now: float) -> Admission:
        """Give the free slots to the most urgent waiting pictures."""
        admitted: list[Picture] = []
        while self._waiting and self._slots.free:
            picture = self._waiting.first()
            try:
                picture.slot = self._slots.acquire(picture.bucket.shape)
            except Exception as error:
                return Admission(admitted, (picture, error))
            self._waiting.remove(picture.turn)
            picture.state = State.IN_PROGRESS
            lane = self._lanes.setdefault(picture.bucket, Lane(now, self._ticks))
            lane.rows.add(picture.turn, picture)
            admitted.append(picture)
            job = self.jobs[picture.request.id]
            job.started = now if job.started is None else job.started
        return Admission(admitted, None)

    def attach(self, job: Job, condition: Condition) -> None:
        """Give all pictures of a request what they are drawn from."""
        job.condition = condition
        for picture in job.pictures:
            picture.condition = condition

    def enter(self, picture: Picture, plan: Plan, start: Start) -> None:
        """Let a picture that has run nothing yet start from a latent, and so run this shorter plan."""
        picture.plan, picture.start = plan, start

    def mark(self, picture: Picture, rows: frozenset[int]) -> None:
        """The picture's latents at the input of these rows are to be kept."""
        picture.marks = rows

    def schedule(self, now: float) -> Tick | None:
        """Choose a lane and as many of its rows, most urgent first, as fit the batch."""
        if not self._lanes:
            return None
        bucket, lane = min(self._lanes.items(), key=lambda item: self._lane_turn(item[1]))
        pictures: list[Picture] = []
        room = self._max_batch
        for picture in lane.rows:
            if picture.evaluations <= room or not pictures:
                pictures.append(picture)
                room -= picture.evaluations
            if room <= 0:
                break
        self._ticks += 1
        lane.served, lane.tick = now, self._ticks
        return Tick(bucket, pictures)

    def _lane_turn(self, lane: Lane) -> Key:
        priority = max(picture.request.priority for picture in lane.rows)
        return (lane.served - priority * self._ageing_s, lane.tick)

    def commit(self, pictures: list[Picture]) -> None:
        """These pictures have run one row."""
        for picture in pictures:
            picture.cursor += 1
            if picture.denoised:
                self._leave_lane(picture)
                self._denoised.add(picture.turn, picture)

    def to_decode(self, limit: int) -> list[Picture]:
        """Up to `limit` denoised pictures of one shape, most urgent first; they stay until completed or ended."""
        if not self._denoised:
            return []
        shape = self._denoised.first().bucket.shape
        return [picture for picture in self._denoised if picture.bucket.shape == shape][:limit]

    def complete(self, picture: Picture) -> bool:
        """The picture is decoded. True when it was the last of its request, which is then no longer live."""
        self._release(picture, State.COMPLETED)
        job = self.jobs[picture.request.id]
        if all(other.state is State.COMPLETED for other in job.pictures):
            self._forget(job)
            return True
        return False

    def end(self, job: Job, state: State) -> None:
        """Stop a request wherever its pictures are; it is no longer live."""
        for picture in job.pictures:
            if not picture.state.terminal:
                self._release(picture, state)
        self._forget(job)

    def _release(self, picture: Picture, state: State) -> None:
        if picture.state is State.QUEUED:
            self._waiting.remove(picture.turn)
        else:
            if picture.denoised:
                self._denoised.remove(picture.turn)
            else:
                self._leave_lane(picture)
            self._slots.release(picture.bucket.shape, picture.slot)
        picture.state = state

    def _leave_lane(self, picture: Picture) -> None:
        lane = self._lanes[picture.bucket]
        lane.rows.remove(picture.turn)
        if not lane.rows:
            del self._lanes[picture.bucket]

    def _forget(self, job: Job) -> None:
        del self.jobs[job.request.id]
        if job.request.deadline_s is not None:
            self._deadlines.remove((job.arrived + job.request.deadline_s, job.turn[1]))
