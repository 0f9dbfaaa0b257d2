"""What all students share: the distance to a target, and the loop that trains towards it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from models.training.checkpoints import Checkpoints
from models.training.compiled import Compiled
from models.training.distributed import Clock, Ranks
from models.training.flat import FlatOptimizer
from models.training.forms import Form
from models.training.lora import Adapters
from models.training.meter import Meter
from models.training.networks import build_unet, frozen
from models.training.ring import Ring
from models.training.sampling import Velocity
from models.training.settings import Preset

_TARGET_RATE = 0.05
_FIRST_STEP_SHARE = 0.15
_WARM_UP = 100
_DECAY_FROM = 0.4  # share of the time after which the learning rate falls

Distance = Callable[[torch.Tensor], torch.Tensor]


def by_element(difference: torch.Tensor, c: float = 1e-3) -> torch.Tensor:
    """Pseudo-Huber of each element, mean over a row's: [B, 4, h, h] -> [B] (Luo et al. 2023)."""
    return ((difference.square() + c**2).sqrt() - c).mean((1, 2, 3))


def by_picture(difference: torch.Tensor, c: float = 0.00054) -> torch.Tensor:
    """Pseudo-Huber of a row's root mean square: [B, 4, h, h] -> [B].

    Song & Dhariwal 2023, section 3.3, with c there 0.00054 sqrt(d) for d elements, divided by sqrt(d).
    """
    return (difference.square().mean((1, 2, 3)) + c**2).sqrt() - c


class StudentLoss(nn.Module):
    """Weighted distance between the student's consistency function and its target."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype, distance: Distance) -> None:
        super().__init__()
        self.velocity = Velocity(unet, dtype)
        self.distance = distance

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        states: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        keep: torch.Tensor,
        take: torch.Tensor,
        *guidance: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, detached loss); x and target [B, 4, h, h], states [B, L, D], the rest [B]; then a `Form`'s factors."""
        form = Form(scale, keep, take)
        ours = form.value(self.velocity(form.seen(x), timestep, states, *guidance), x)
        loss = (weight * self.distance(ours - target)).mean()
        return loss, loss.detach()


def places(count: int, batch: int, device: torch.device) -> torch.Tensor:
    """Random places [B] in a grid of `count`, noisiest first: the first more often, since all pictures start there."""
    index = torch.randint(0, count, (batch,), device=device)
    return torch.where(torch.rand(batch, device=device) < _FIRST_STEP_SHARE, 0, index)


class Lessons(Protocol):
    """Batches for a student."""

    def draw(self, progress: float) -> tuple[torch.Tensor, ...]:
        """The arguments of `StudentLoss.forward`, at `progress` (0 to 1) of the training."""


class Course:
    """Lessons from one ring, and the compiled step that learns from them."""

    def __init__(self, ring: Ring, refill_every: int, lessons: Lessons, step: Compiled) -> None:
        self._ring, self._refill_every, self._lessons, self._step = ring, refill_every, lessons, step
        self._done = 0

    def take(self, progress: float) -> torch.Tensor:
        """One forward and backward; returns the loss."""
        if self._done % self._refill_every == 0:
            self._ring.refill()
        self._done += 1
        loss: torch.Tensor = self._step(*self._lessons.draw(progress))[1]
        return loss


@dataclass(frozen=True)
class Student:
    """One network in training.

    name: of its checkpoint.
    trained: the module whose parameters `optimizer` holds.
    target: a module with the same parameters, which follow them as a moving average; None: the student is its own.
    courses: the first is taken at every step, all at every `large_every`-th.
    """

    name: str
    trained: nn.Module
    optimizer: FlatOptimizer
    target: nn.Module | None
    courses: Sequence[Course]
    rate: float
    batch: int


def train(student: Student, preset: Preset, ranks: Ranks, checkpoints: Checkpoints, seconds: float) -> dict[str, Any]:
    """Train for `seconds`; returns the figures, which count the pictures of the first course."""
    name, optimizer = student.name, student.optimizer
    clock = Clock(ranks, checkpoints.resume(name, optimizer))
    average = (optimizer.ema if optimizer.iterations else optimizer.master).clone()
    if student.target is not None:
        optimizer.copy_to(student.target, average)
    torch.manual_seed(preset.seed + 2000 + 17 * optimizer.iterations + ranks.rank)
    meter = Meter(clock, ranks.share(student.batch) * ranks.size)
    while meter.elapsed < seconds:
        progress = meter.elapsed / seconds
        rate = student.rate * min(1.0, (optimizer.iterations + 1) / min(_WARM_UP, 4 * preset.warm_up))
        rate *= max(0.01, min(1.0, (1 - progress) / (1 - _DECAY_FROM)))
        # The first step takes all courses, so that every graph is compiled before the clock starts.
        courses = student.courses[:1] if meter.done % preset.large_every else student.courses
        losses = [course.take(progress) for course in courses]
        optimizer.step(rate)
        if student.target is not None:
            average.lerp_(optimizer.master, _TARGET_RATE)
            optimizer.copy_to(student.target, average)
        meter.step(losses[0][None])
        checkpoints.keep(name, optimizer, clock, meter.done)
        if meter.due(preset.log_every, (1, 20)):
            ranks.log(
                f"{name} {optimizer.iterations} loss {meter.means()[0]:.5f} rate {rate:.1e} "
                f"{meter.elapsed:.0f} s {meter.speed:.0f} pictures/s"
            )
    figures = meter.figures(optimizer.iterations, student.trained)
    ranks.log(f"{name}:", figures)
    return figures


class LoraStudent:
    """A student that is the teacher with adapters: its UNet, optimiser and compiled step, and its averaged twin."""

    def __init__(
        self,
        name: str,
        preset: Preset,
        teacher: dict[str, Any],
        text_width: int,
        ranks: Ranks,
        *,
        rank: int,
        distance: Distance,
        average: float,
    ) -> None:
        self._name, self._preset, self._ranks, self._rank = name, preset, ranks, rank
        self._weights, self._text_width = teacher, text_width
        torch.manual_seed(preset.seed + 7)
        self.unet, self.adapters = self.twin()
        self.optimizer = FlatOptimizer(self.adapters, ranks, average=average)
        loss = StudentLoss(self.unet, ranks.dtype, distance)
        self.step = Compiled(loss, name, ranks, backward=True, clear=self.optimizer.clear)

    def teacher(self) -> UNet2DConditionModel:
        """The plain teacher, frozen in training precision."""
        unet = build_unet(self._preset, self._text_width, guided=False)
        unet.load_state_dict(self._weights)
        return cast(UNet2DConditionModel, frozen(unet, self._ranks.device, self._ranks.dtype))

    def twin(self) -> tuple[UNet2DConditionModel, Adapters]:
        """Another UNet with adapters of the same shapes."""
        unet = self.teacher()
        return unet, Adapters(unet, self._rank)

    def train(
        self, ring: Ring, lessons: Lessons, target: Adapters | None, checkpoints: Checkpoints, seconds: float
    ) -> dict[str, Any]:
        """Train; the finished checkpoint holds the averaged LoRA in float32, under the names of `Adapters.weights`."""
        preset = self._preset
        courses = [Course(ring, preset.refill_every, lessons, self.step)]
        student = Student(
            self._name, self.adapters, self.optimizer, target, courses, preset.lora_rate, preset.lora_batch
        )
        figures = train(student, preset, self._ranks, checkpoints, seconds)
        weights = self.adapters.weights(self.optimizer.views(self.optimizer.ema))
        checkpoints.save(self._name, {"weights": weights, "figures": figures}, finished=True)
        return figures
