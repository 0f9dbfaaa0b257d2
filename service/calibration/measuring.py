"""What a second prompt's pictures lose that start from the first's latents, row by row and bin by bin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from models.diffusion.model import DiffusionModel, ModelCard
from models.scorer import Scorer
from service.calibration.drawing import Drawing, judged
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


def rows_run(family: Family, pairs: int) -> int:
    """Rows of pictures that `measure` runs: the first's up to the last K, the second's from scratch and from each K."""
    return pairs * (family.rows[-1] + sum(family.steps - start for start in (0, *family.rows)))


def measure(
    drawing: Drawing, model: DiffusionModel, scorer: Scorer, pairs: Sequence[Pair], rows: Sequence[int]
) -> dict[int, Verdicts]:
    """Row K -> verdicts of the second pictures that start there; K = 0 is from scratch."""
    firsts, seconds = [pair.first for pair in pairs], [pair.second for pair in pairs]
    with torch.inference_mode():
        latents = drawing.run(firsts, drawing.noise(firsts), 0, keep=rows, until=rows[-1])
        found = {}
        for start in (0, *rows):
            begun = latents[start] if start else drawing.noise(seconds)
            found[start] = judged(model, scorer, drawing.run(seconds, begun, start)[drawing.steps], seconds)
    return found


def means(verdicts: Verdicts, places: Sequence[int]) -> dict[str, Any]:
    """Mean score, and the share that is right of those whose record says something, of the pairs at these places."""
    found = {}
    for metric in ("score", *SHARES):
        values = [value for place in places if (value := verdicts[metric][place]) is not None]
        if values:
            found[metric] = round(sum(values) / len(values), 4)
    return found
