"""What rank 0 tells its followers and what they answer, pickled through pipes between the processes of one service.

    Load -> Answer, Meet -> Answer, then Evaluate -> Answer for each network call, and Decode -> Answer for pictures
    that ranks share; the end of the pipe ends a follower.

A network call runs in teams of `degree` ranks, whose first rank leads. After an Evaluate of a degree above 1, or a
Decode, a leader sends the others of its team the PatchCalls or DecodeCalls that it makes, and None after the last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from models.diffusion.model import Condition, TextStates
from service.config import ModelSettings

Loras = tuple[tuple[str, float], ...]
Network = tuple[str, Loras]  # a denoiser's name: a sampler that it runs, and the LoRAs with which it does
Shape = tuple[int, int, int]  # latent channels, height, width


class Load(NamedTuple):
    """Load the model that rank 0 has loaded; `model.device` is this rank's own and `model.dtype` is resolved."""

    model: ModelSettings
    threads: int  # of the CPU


class Meet(NamedTuple):
    """Join the process group of `gpus` ranks, whose store listens on `port` of this machine."""

    rank: int
    gpus: int
    port: int
    timeout_s: float  # of a collective call on the CPU
    warm_up: int  # rows of a picture that a team runs synchronously
    launch: str  # how the network of a shared picture is run, one of patch_launch.LAUNCHES


class Text(NamedTuple):
    """Text states that are broadcast after the order: the shapes of their tensors."""

    hidden: tuple[int, ...]
    pooled: tuple[int, ...] | None
    dtype: torch.dtype


class Lesson(NamedTuple):
    """A condition that followers have not seen, under the number by which orders name it."""

    number: int
    positive: Text | None
    negative: Text | None
    guidance_scale: float
    time_ids: tuple[float, ...] | None
    class_label: int | None


class Evaluate(NamedTuple):
    """One network call.

    loras: those that act.
    shares: the rows of the batch that each team runs. Where there is one team, rank 0 leads it and has all of them;
        else the lessons' tensors and then the batch are broadcast to all ranks, and the results gathered.
    slots, ran: of each row, where degree is above 1: its latent slot, and the rows that the picture has run.
    conditions: the number of each row's condition; none where there is one team.
    forget: numbers that no later order names. released: slots whose pictures have ended, with the team that had them.
    """

    network: Network
    loras: Loras
    shape: Shape
    degree: int
    shares: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...] = ()
    ran: tuple[int, ...] = ()
    conditions: tuple[int, ...] = ()
    lessons: tuple[Lesson, ...] = ()
    forget: tuple[int, ...] = ()
    released: tuple[tuple[int, int], ...] = ()  # (team, slot), of the order's shape and degree

    @property
    def rows(self) -> int:
        return sum(map(len, self.shares))

    @property
    def alone(self) -> bool:
        """One team runs it all."""
        return len(self.shares) == 1


class Decode(NamedTuple):
    """Pictures become pixels on the first `degree` ranks."""

    degree: int


class Answer(NamedTuple):
    """fault: what went wrong with the order, None: nothing. no_memory: it was memory that ran out.

    conditions: how many of them the follower holds.
    """

    fault: str | None = None
    no_memory: bool = False
    conditions: int = 0


Order = Load | Meet | Evaluate | Decode


def degrees_of(gpus: int) -> tuple[int, ...]:
    """The patch degrees above 1 for which teams are formed: powers of two."""
    return tuple(2**power for power in range(1, gpus.bit_length()) if 2**power <= gpus)


def lesson(number: int, condition: Condition) -> Lesson:
    """What followers must be told of a condition before its tensors are broadcast (see `tensors_of`)."""
    return Lesson(
        number,
        _text(condition.positive),
        _text(condition.negative),
        condition.guidance_scale,
        condition.time_ids,
        condition.class_label,
    )


def blank(lesson: Lesson, device: torch.device) -> Condition:
    """The condition of a lesson, its tensors not yet filled."""
    return Condition(
        _states(lesson.positive, device),
        _states(lesson.negative, device),
        lesson.guidance_scale,
        lesson.time_ids,
        lesson.class_label,
    )


def tensors_of(condition: Condition) -> list[torch.Tensor]:
    """A condition's tensors in the order in which they are broadcast."""
    states = [states for states in (condition.positive, condition.negative) if states is not None]
    return [tensor for each in states for tensor in (each.hidden, each.pooled) if tensor is not None]


def _text(states: TextStates | None) -> Text | None:
    if states is None:
        return None
    pooled = None if states.pooled is None else tuple(states.pooled.shape)
    return Text(tuple(states.hidden.shape), pooled, states.hidden.dtype)


def _states(text: Text | None, device: torch.device) -> TextStates | None:
    if text is None:
        return None
    pooled = None if text.pooled is None else torch.empty(text.pooled, dtype=text.dtype, device=device)
    return TextStates(torch.empty(text.hidden, dtype=text.dtype, device=device), pooled)
