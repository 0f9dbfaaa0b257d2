"""How different the pictures of a prompt asked again are, from one picture's latents and from scratch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from models.diffusion.model import DiffusionModel
from models.scorer import Reading, Scorer
from service.calibration.drawing import Drawing, Start, readings
from service.calibration.pairs import reseeded
from service.evaluation.prompts import Record

PROMPTS = 24
PICTURES = 10  # of each prompt


class Answers:
    """Ten pictures of each of some prompts, from scratch or from the latents that an earlier picture of it left.

    Args:
        records: one a prompt; its own seed is the earlier picture's.
        rows: those that the earlier picture's latents are kept at.
    """

    def __init__(
        self, drawing: Drawing, model: DiffusionModel, scorer: Scorer, records: Sequence[Record], rows: Sequence[int]
    ) -> None:
        self._drawing, self._model, self._scorer = drawing, model, scorer
        self._records = [reseeded(record, 1 + i) for record in records for i in range(PICTURES)]
        self._distances: dict[Start, float] = {}
        with torch.inference_mode():
            latents = drawing.run(records, drawing.noise(records), 0, keep=rows, until=max(rows))
            self._latents = {row: kept.repeat_interleave(PICTURES, 0) for row, kept in latents.items()}
            self.scratch = self._distance(drawing.noise(self._records), 0)

    def distance(self, start: Start) -> float:
        """Mean pairwise distance among ten pictures that start so; `scratch` is that among ten from noise."""
        if start not in self._distances:
            with torch.inference_mode():
                x = self._drawing.entered(self._records, self._latents, start)
                self._distances[start] = self._distance(x, start.row)
        return self._distances[start]

    def _distance(self, x: torch.Tensor, first: int) -> float:
        drawn = self._drawing.run(self._records, x, first)[self._drawing.steps]
        read = Reading.cat(list(readings(self._model, self._scorer, drawn)))
        return sum(spread(part) for part in layouts(read).split(PICTURES)) * PICTURES / len(drawn)


def layouts(reading: Reading) -> torch.Tensor:
    """[N, P * W]: what each patch of a picture looks like to the scorer, so that distances are LPIPS's.

    LPIPS (arXiv 1801.03924) is the usual measure of how much the pictures of one input differ: the mean over places of
    the squared distance between a network's features there, each of unit norm. Here the network is the scorer's image
    tower, one layer and unweighted. A picture's embedding would not do: it is trained to be that of the prompt.
    """
    patches: torch.Tensor = F.normalize(reading.patches.float(), dim=-1)
    return patches.flatten(1) / math.sqrt(patches.shape[1])


def spread(pictures: torch.Tensor) -> float:
    """Mean squared distance of all pairs of pictures [N, D], N at least 2."""
    return float(F.pdist(pictures).square().mean())
