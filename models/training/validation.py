"""What the scorer can be trusted with: held-out renders, records told wrongly in one thing, spoilt pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from models.scorer import Reading, Scorer, frechet
from models.scorer.config import Thresholds
from models.scorer.judging import measure, verdicts
from models.training.captions import CaptionWriter
from models.training.prompts import Record, records_of
from models.training.scenes import KINDS, Scenes, Stage
from models.training.scorer import Alteration, alter, make_scorer
from models.training.settings import Preset
from models.training.text import TextTower

_CHUNK = 64
_GRID = (0.3, 0.4, 0.5, 0.6, 0.7)
_NOISE = 0.6  # standard deviation, of pictures in [-1, 1]
_BLUR = 8  # pictures are halved until so many times smaller, and enlarged again

# Of a planted fault: the kind of scene, what its record tells wrongly, the metric that must see it.
_FAULTS = {
    "wrong object": ("single", Alteration.OBJECT, "objects"),
    "wrong object of two": ("pair", Alteration.OBJECT, "objects"),
    "wrong colour": ("recoloured", Alteration.COLOUR, "colours"),
    "wrong count": ("counts", Alteration.COUNT, "count"),
    "objects exchanged": ("pair", Alteration.EXCHANGE, "relation"),
    "wrong style": ("single", Alteration.STYLE, "style"),
    "wrong background": ("single", Alteration.GROUND, "background"),
}


def shares(found: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Each metric's mean over the records that say something of it."""
    said = {metric: [float(value) for value in values if value is not None] for metric, values in found.items()}
    return {metric: round(sum(values) / len(values), 4) for metric, values in said.items() if values}


def noisy(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures + _NOISE * torch.randn_like(pictures)).clamp(-1, 1)


def blurred(pictures: torch.Tensor) -> torch.Tensor:
    small = F.avg_pool2d(pictures, _BLUR)
    return F.interpolate(small, scale_factor=_BLUR, mode="bicubic", align_corners=False).clamp(-1, 1)


class Validation:
    """Renders scenes and has them read and judged."""

    def __init__(self, scorer: Scorer, stage: Stage, writer: CaptionWriter) -> None:
        self._scorer, self._stage, self._writer = scorer, stage, writer

    def _read(
        self, scenes: Scenes, fault: Callable[[torch.Tensor], torch.Tensor] = lambda pictures: pictures
    ) -> Reading:
        side = self._scorer.sizes.side
        starts = range(0, len(scenes), _CHUNK)
        parts = [self._stage.compose(scenes[slice(start, start + _CHUNK)], side) for start in starts]
        return Reading.cat([self._scorer.read(fault(part)) for part in parts])

    def _records(self, scenes: Scenes) -> list[Record]:
        """Records of scenes, with captions of any wording as prompts."""
        captions = self._writer.texts(self._writer.slots(scenes))
        return records_of("validation", scenes, captions, self._stage, 0)

    def thresholds(self, count: int) -> Thresholds:
        """Those that best tell `count` renders' own records from records with one object more or one less.

        A picture of two groups gets a record that leaves out the second; one of a single group, a record that names
        another object besides.
        """
        scenes = self._stage.sample(count)
        reading, true = self._read(scenes), self._records(scenes)
        absent = alter(scenes, torch.zeros_like(scenes.relation), len(self._stage.concepts))[0].concept[:, 0].tolist()
        false = []
        for record, other in zip(true, absent, strict=True):
            one, *two = record["objects"]
            more = {**one, "concept": self._stage.concepts[other].name}
            false.append({**record, "objects": [one] if two else [one, more]})
        vocabulary = self._scorer.vocabulary
        measured = [measure(self._scorer.network, reading, records, vocabulary) for records in (true, false)]

        def margin(tried: Thresholds) -> float:
            right, wrong = (
                verdicts(found, records, vocabulary, tried)["objects"].count(True)
                for found, records in zip(measured, (true, false), strict=True)
            )
            # Among equals, those in the middle.
            return (right - wrong) / count - 0.01 * (abs(tried.present - 0.5) + abs(tried.extra - 0.5))

        return max((Thresholds(present, extra) for present in _GRID for extra in _GRID), key=margin)

    def figures(self, count: int) -> dict[str, Any]:
        """Shares by kind on `count` held-out renders each; with planted faults; and scores and Fréchet distances."""
        scenes = {kind: self._stage.sample_held_out(count, kind) for kind in KINDS}
        readings = {kind: self._read(part) for kind, part in scenes.items()}
        records = {kind: self._records(part) for kind, part in scenes.items()}
        renders = {kind: shares(self._scorer.judge(readings[kind], records[kind])) for kind in KINDS}
        nearest = self._scorer.concepts(readings["single"], 1)[:, 0] == scenes["single"].concept[:, 0]
        renders["single"]["nearest name"] = round(nearest.float().mean().item(), 4)

        every, rows = Scenes.cat(list(scenes.values())), [record for kind in KINDS for record in records[kind]]
        reading = Reading.cat(list(readings.values()))
        again = self._read(Scenes.cat([self._stage.sample_held_out(count, kind) for kind in KINDS])).features
        seen = {"renders": reading, "noise": self._read(every, noisy), "blur": self._read(every, blurred)}
        return {
            "renders": renders,
            "told wrongly": {
                name: self._told_wrongly(scenes[kind], readings[kind], records[kind], alteration, metric)
                for name, (kind, alteration, metric) in _FAULTS.items()
            },
            "pictures": {
                name: {**shares(self._scorer.judge(found, rows)), "frechet": round(frechet(found.features, again), 4)}
                for name, found in seen.items()
            },
        }

    def _told_wrongly(
        self, scenes: Scenes, reading: Reading, records: Sequence[Record], alteration: Alteration, metric: str
    ) -> dict[str, float]:
        """The share that `metric` finds right, and the mean score, of records that are true and that are not.

        "preferred": the share whose true caption scores higher than the wrong one.
        """
        kind = torch.full((len(scenes),), int(alteration), device=self._stage.device)
        wrong, said = alter(scenes, kind, len(self._stage.concepts))
        rows = said.nonzero()[:, 0]
        if not len(rows):
            return {}
        kept = Reading(*(field[rows] for field in reading))
        true = self._scorer.judge(kept, [records[row] for row in rows.tolist()])
        false = self._scorer.judge(kept, self._records(wrong[rows]))
        preferred = [a > b for a, b in zip(true["score"], false["score"], strict=True)]
        told = {"true": shares(true), "wrong": shares(false)}
        return {
            **{how: figures.get(metric, 0.0) for how, figures in told.items()},
            **{f"{how} score": figures["score"] for how, figures in told.items()},
            "preferred": sum(preferred) / len(preferred),
        }


def calibrate(
    preset: Preset,
    weights: Mapping[str, torch.Tensor],
    stage: Stage,
    writer: CaptionWriter,
    tower: TextTower,
    count: int,
) -> tuple[Thresholds, dict[str, Any]]:
    """The thresholds for a trained scorer, and its figures under them, of `count` renders of each kind."""
    thresholds = Validation(make_scorer(preset, weights, stage, tower), stage, writer).thresholds(4 * count)
    figures = Validation(make_scorer(preset, weights, stage, tower, thresholds), stage, writer).figures(count)
    return thresholds, figures
