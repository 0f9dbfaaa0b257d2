"""Many pictures of one sampler, drawn outside the engine from any row of its plan on, and their latents on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from accel.kernels.sampler_step import sampler_step
from accel.samplers.library import build_plan, renoise
from accel.samplers.noise import ENTRY_ROW, INITIAL_ROW, gaussian
from accel.samplers.plans import Plan
from models.diffusion.model import Condition, DiffusionModel
from models.scorer import Reading, Scorer
from service.errors import NonFiniteError
from service.evaluation.prompts import Record

DECODED_AT_ONCE = 16

Latents = dict[int, torch.Tensor]  # by row: [N, C, h, w]


class Start(NamedTuple):
    """Latents of row `level`, re-noised to those of row `row`, where the plan is entered."""

    level: int
    row: int


class Drawing:
    """One sampler of a model, at its own guidance.

    Args:
        batch: pictures of one network call.
        done: called with the number of pictures that have moved on by a row.
    """

    def __init__(
        self,
        model: DiffusionModel,
        sampler: str,
        steps: int,
        batch: int,
        done: Callable[[int], object] = lambda pictures: None,
    ) -> None:
        self.sampler, self.steps = sampler, steps
        self._model, self._batch, self._done = model, batch, done

    def plan(self, first: int = 0) -> Plan:
        defaults = self._model.card.samplers[self.sampler]
        schedule = self._model.schedule(self.sampler)
        return build_plan(
            self.sampler, schedule, self.steps, spacing=defaults.spacing, karras=defaults.karras, first=first
        )

    def noise(self, records: Sequence[Record]) -> torch.Tensor:
        """The latents [N, C, h, w] that the records' pictures start from."""
        card = self._model.card
        width, height = card.default_size
        shape = (card.latent_channels, height // card.scale, width // card.scale)
        return gaussian(self._seeds(records), INITIAL_ROW, shape, self._model.device) * self.plan().init_scale

    def entered(self, records: Sequence[Record], latents: Latents, start: Start) -> torch.Tensor:
        """The latents [N, C, h, w] at row `start.row`, with noise of the records' own seeds in them."""
        rows, x = self.plan().rows, latents[start.level]
        kept, fresh = renoise(rows[start.level].alpha, rows[start.row].alpha)
        return kept * x + fresh * gaussian(self._seeds(records), ENTRY_ROW, tuple(x.shape[1:]), self._model.device)

    def run(
        self,
        records: Sequence[Record],
        x: torch.Tensor,
        first: int,
        keep: Collection[int] = (),
        until: int | None = None,
    ) -> Latents:
        """Latents at the rows `keep` and at `until`, of pictures whose latents at row `first` are x.

        Args:
            until: the first row that is not run; None: `steps`, so that its latents are those of whole pictures.

        Raises:
            NonFiniteError: the network returned what is not a number.
        """
        x, kept = x.clone(), {}
        until = self.steps if until is None else until
        conditions, seeds = self._conditions(records), self._seeds(records)
        denoiser, device = self._model.denoiser(self.sampler), self._model.device
        previous, finite = torch.zeros_like(x), torch.ones(len(x), dtype=torch.bool, device=device)
        for index, row in enumerate(self.plan(first).rows[: until - first], start=first):
            if index in keep:
                kept[index] = x.clone()
            for slots in torch.arange(len(x), device=device).split(self._batch):
                one = torch.ones(len(slots), device=device)
                some = conditions[int(slots[0]) : int(slots[-1]) + 1]
                denoised = denoiser(x[slots], row.t * one, row.alpha * one, some)
                coefficients = torch.tensor([[row.a, row.b, row.c, row.s]], device=device).expand(len(slots), 4)
                rows = torch.full_like(slots, index)
                sampler_step(x, previous, slots, denoised, coefficients.contiguous(), seeds[slots], rows, finite)
                self._done(len(slots))
        if not finite.all():
            raise NonFiniteError(f"{self.sampler} drew latents that are not finite")
        return {**kept, until: x}

    def _conditions(self, records: Sequence[Record]) -> list[Condition]:
        guidance = self._model.card.samplers[self.sampler].guidance_scale
        prompts = [(record["prompt"], "") for record in records]
        size = self._model.card.default_size
        found: list[Condition] = []
        for at in range(0, len(prompts), self._batch):
            part = prompts[at : at + self._batch]
            found += self._model.encode(part, [guidance] * len(part), self.sampler, size)
        return found

    def _seeds(self, records: Sequence[Record]) -> torch.Tensor:
        return torch.tensor([record["seed"] for record in records], device=self._model.device)


def judged(
    model: DiffusionModel, scorer: Scorer, latents: torch.Tensor, records: Sequence[Record]
) -> dict[str, list[float | None]]:
    """`verdicts_of` the pictures of latents [N, C, h, w]."""
    found: dict[str, list[float | None]] = {}
    at = 0
    for reading in readings(model, scorer, latents):
        part = records[at : at + len(reading.embedding)]
        at += len(part)
        for metric, values in verdicts_of(scorer, reading, part).items():
            found.setdefault(metric, []).extend(values)
    return found


def readings(model: DiffusionModel, scorer: Scorer, latents: torch.Tensor) -> Iterator[Reading]:
    """What the pictures of latents [N, C, h, w] show, some at a time."""
    for part in latents.split(DECODED_AT_ONCE):
        yield scorer.read(model.decode(part).permute(0, 3, 1, 2).float() / 127.5 - 1)


def verdicts_of(scorer: Scorer, reading: Reading, records: Sequence[Record]) -> dict[str, list[float | None]]:
    """What the scorer says of N pictures: N values a metric, 1 for right, 0 for wrong; None where a record is silent.

    A record that names no object has a score alone.
    """
    # The scorer wants an object. Where a record names none, it gets one, and nobody asks what it says of it.
    some = [{"concept": scorer.vocabulary.names[0], "count": 1, "colour": None, "size": None}]
    verdicts = scorer.judge(reading, [record | {"objects": record["objects"] or some} for record in records])
    return {
        metric: [
            float(value) if value is not None and (metric == "score" or record["objects"]) else None
            for value, record in zip(values, records, strict=True)
        ]
        for metric, values in verdicts.items()
    }
