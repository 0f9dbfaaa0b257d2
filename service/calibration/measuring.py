"""What a second prompt's pictures lose that start from the first's latents, row by row and bin by bin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from models.diffusion.model import DiffusionModel, ModelCard
from models.scorer import Scorer
from service.calibration.diversity import PICTURES
from service.calibration.drawing import Drawing, Start, judged
from service.calibration.pairs import Pair

SHARES = ("all", "objects", "background")

Verdicts = dict[str, list[float | None]]  # metric -> a value a pair, None where its record says nothing


class Family(NamedTuple):
    """Samplers that share their bins, the one of them that is measured, and the rows K that a picture may start at."""

    name: str
    sampler: str
    steps: int
    rows: tuple[int, ...]


def families(card: ModelCard) -> list[Family]:
    """Those that the model can run without a LoRA: 50 DDIM steps for all solvers, few-step samplers at their own."""
    found = []
    if "ddim" in card.samplers:
        found.append(Family("solver", "ddim", 50, tuple(range(5, 40, 5))))
    for name in ("lcm", "consistency"):
        defaults = card.samplers.get(name)
        if defaults is not None and defaults.steps > 1 and not defaults.needs_lora:
            found.append(Family(name, name, defaults.steps, tuple(range(1, defaults.steps))))
    return found


def rows_run(family: Family, pairs: int, prompts: int) -> int:
    """Rows of pictures that are run at the least, for so many pairs and prompts asked again.

    Of pairs, the first's up to the last K, the second's from scratch and from each K; of prompts, one picture's up to
    the same K, and those from scratch. What fresh noise is measured with comes on top.
    """
    whole = pairs + PICTURES * prompts
    return (
        (pairs + prompts) * family.rows[-1]
        + whole * family.steps
        + pairs * sum(family.steps - start for start in family.rows)
    )


class Seconds:
    """The second pictures of pairs, from scratch and from the first's latents.

    Args:
        rows: those that the first's latents are kept at.
    """

    def __init__(
        self, drawing: Drawing, model: DiffusionModel, scorer: Scorer, pairs: Sequence[Pair], rows: Sequence[int]
    ) -> None:
        self._drawing, self._model, self._scorer = drawing, model, scorer
        self._records = [pair.second for pair in pairs]
        firsts = [pair.first for pair in pairs]
        with torch.inference_mode():
            self._latents = drawing.run(firsts, drawing.noise(firsts), 0, keep=rows, until=max(rows))
            self._scratch = self._judged(drawing.noise(self._records), 0)

    def verdicts(self, starts: Mapping[int, Start]) -> dict[int, Verdicts]:
        """K -> verdicts of the pictures that start as `starts` says of K; K = 0 is from scratch."""
        found = {0: self._scratch}
        with torch.inference_mode():
            for k, start in starts.items():
                found[k] = self._judged(self._drawing.entered(self._records, self._latents, start), start.row)
        return found

    def _judged(self, x: torch.Tensor, first: int) -> Verdicts:
        drawing, records = self._drawing, self._records
        return judged(self._model, self._scorer, drawing.run(records, x, first)[drawing.steps], records)


def means(verdicts: Verdicts, places: Sequence[int]) -> dict[str, Any]:
    """Mean score, and the share that is right of those whose record says something, of the pairs at these places."""
    found = {}
    for metric in ("score", *SHARES):
        values = [value for place in places if (value := verdicts[metric][place]) is not None]
        if values:
            found[metric] = round(sum(values) / len(values), 4)
    return found
