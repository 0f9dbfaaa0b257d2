"""The records that the scheduler keeps and the runner reads: a picture on its way, its request, the rows of a tick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from accel.samplers.plans import Plan, Row
from service.diffusion.request import ImageRequest, State, Timings
from service.diffusion.starts import Start

if TYPE_CHECKING:
    from models.diffusion.model import Condition

Key = tuple[float, ...]
Arriving = Callable[[], np.ndarray]  # waits for a copy on its way to the host, and returns it


class Bucket(NamedTuple):
    """What the rows of one tick have in common."""

    network: str
    shape: tuple[int, int, int]  # latent channels, height, width
    loras: tuple[tuple[str, float], ...]
    degree: int = 1  # GPUs that share each picture


@dataclass(slots=True, eq=False)
class Picture:
    """One picture of a request, somewhere between its plan's first row and its last."""

    request: ImageRequest
    index: int
    seed: int
    plan: Plan
    bucket: Bucket
    turn: Key  # earlier is more urgent
    condition: Condition | None = None  # set before its first tick
    start: Start | None = None  # None: it starts from noise
    marks: frozenset[int] = frozenset()  # rows whose input latents are kept
    cursor: int = 0  # rows run
    slot: int = -1  # held while in progress
    state: State = State.QUEUED

    @property
    def row(self) -> Row:
        return self.plan.rows[self.cursor]

    @property
    def denoised(self) -> bool:
        return self.cursor == len(self.plan)

    @property
    def marked(self) -> bool:
        """Its latent, as it is now, is to be kept."""
        return self.state is State.IN_PROGRESS and self.cursor in self.marks

    @property
    def evaluations(self) -> int:
        """Network rows that one step of this picture takes."""
        assert self.condition is not None
        return self.condition.evaluations


@dataclass(slots=True, eq=False)
class Job:
    """A request that is not terminal yet, and its times in seconds.

    looked: whether latents to start from were looked for. latents: those kept so far, by alpha.
    """

    request: ImageRequest
    pictures: list[Picture]
    arrived: float
    turn: Key
    started: float | None = None
    condition: Condition | None = None
    looked: bool = False
    latents: dict[float, Arriving] = field(default_factory=dict)
    encode_s: float = 0.0
    lookup_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0

    def timings(self, now: float) -> Timings:
        queued = (now if self.started is None else self.started) - self.arrived
        return Timings(
            queue_s=queued,
            encode_s=self.encode_s,
            lookup_s=self.lookup_s,
            denoise_s=self.denoise_s,
            decode_s=self.decode_s,
            patch_degree=self.request.patch_degree,
            total_s=now - self.arrived,
        )


class Tick(NamedTuple):
    bucket: Bucket
    pictures: list[Picture]

    @property
    def evaluations(self) -> int:
        return sum(picture.evaluations for picture in self.pictures)
