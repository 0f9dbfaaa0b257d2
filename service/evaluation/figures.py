"""From what was drawn and judged, picture by picture, to the figures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from service.evaluation.metrics import SHARES
from service.evaluation.prompts import TWINS

TWINS_BY = ("objects", "all")  # metrics by which other wordings are compared with their twins


@dataclass(frozen=True, slots=True)
class Judged:
    """One picture.

    verdicts: metric -> right or not; only metrics of which the record says something.
    cache: "hit", "miss" or "bypass", as a reply has it. steps_skipped: rows of its plan that a hit left out.
    """

    line: int
    id: str
    group: str | None
    twin: str | None
    prompt: str
    seed: int
    evaluations: int
    score: float  # cosine of picture and prompt
    verdicts: dict[str, bool]
    cache: str = "bypass"
    steps_skipped: int = 0


class Share(NamedTuple):
    """The share of n pictures that are right."""

    share: float
    n: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over n pictures. shares: metric -> share of those pictures whose record says something of it."""

    n: int
    score: float
    shares: dict[str, Share]


class TwinFigures(NamedTuple):
    """A group of other wordings against the same pictures in trained words, over n pairs."""

    share: float
    twins_share: float
    n: int

    @property
    def ratio(self) -> float | None:
        return self.share / self.twins_share if self.twins_share else None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one run.

    settings: of every picture, defaults filled in.
    overall: of all pictures but those of the group "twins".
    groups: by group, the twins' too; empty where the prompts have none.
    twins: group -> metric -> comparison.
    frechet: squared Frechet distance of the pictures of `overall` to real renders; None: not measured.
    wall_s, engine_s: seconds of drawing all pictures: by the clock, and of the engine's own work.
    notes: what a reader of the figures must know.
    """

    settings: dict[str, Any]
    rows: list[Judged]
    overall: Figures
    groups: dict[str, Figures]
    twins: dict[str, dict[str, TwinFigures]]
    frechet: float | None
    evaluations_per_picture: float
    wall_s: float
    engine_s: float
    notes: list[str]

    @property
    def hit_rate(self) -> float:
        """Share of all pictures that started from a latent of the cache."""
        return sum(row.cache == "hit" for row in self.rows) / len(self.rows)

    @property
    def steps_skipped_per_picture(self) -> float:
        return sum(row.steps_skipped for row in self.rows) / len(self.rows)

    @property
    def seconds_per_picture(self) -> float:
        return self.wall_s / len(self.rows)

    def as_json(self) -> dict[str, Any]:
        pictures = len(self.rows)
        return {
            "settings": self.settings,
            "pictures": pictures,
            "evaluations_per_picture": self.evaluations_per_picture,
            "cache": {"hit_rate": self.hit_rate, "steps_skipped_per_picture": self.steps_skipped_per_picture},
            "seconds_per_picture": self.seconds_per_picture,
            "engine_seconds_per_picture": self.engine_s / pictures,
            "pictures_per_second": pictures / self.wall_s,
            "overall": _as_json(self.overall),
            "groups": {name: _as_json(figures) for name, figures in self.groups.items()},
            "twins": {
                group: {
                    metric: {"share": pair.share, "twins_share": pair.twins_share, "ratio": pair.ratio, "n": pair.n}
                    for metric, pair in found.items()
                }
                for group, found in self.twins.items()
            },
            "frechet": self.frechet,
            "notes": self.notes,
        }


def figures_of(rows: Sequence[Judged], metrics: Sequence[str]) -> Figures:
    """Of at least one picture."""
    shares = {}
    for metric in metrics:
        verdicts = [row.verdicts[metric] for row in rows if metric in row.verdicts]
        if metric in SHARES and verdicts:
            shares[metric] = Share(sum(verdicts) / len(verdicts), len(verdicts))
    return Figures(len(rows), sum(row.score for row in rows) / len(rows), shares)


def groups_of(rows: Sequence[Judged], metrics: Sequence[str]) -> dict[str, Figures]:
    """Figures by group, in the order in which the groups first appear."""
    groups: dict[str, list[Judged]] = {}
    for row in rows:
        if row.group is not None:
            groups.setdefault(row.group, []).append(row)
    return {name: figures_of(members, metrics) for name, members in groups.items()}


def twins_of(rows: Sequence[Judged], metrics: Sequence[str]) -> dict[str, dict[str, TwinFigures]]:
    by_id = {row.id: row for row in rows}
    pairs: dict[str, list[tuple[Judged, Judged]]] = {}
    for row in rows:
        if row.group != TWINS and row.twin in by_id:
            pairs.setdefault(row.group or "", []).append((row, by_id[row.twin]))
    found: dict[str, dict[str, TwinFigures]] = {}
    for group, members in pairs.items():
        for metric in (name for name in TWINS_BY if name in metrics):
            both = [
                (own.verdicts[metric], other.verdicts[metric])
                for own, other in members
                if metric in own.verdicts and metric in other.verdicts
            ]
            if both:
                share, twins_share = (sum(side) / len(both) for side in zip(*both, strict=True))
                found.setdefault(group, {})[metric] = TwinFigures(share, twins_share, len(both))
    return found


def _as_json(figures: Figures) -> dict[str, Any]:
    shares = {metric: {"share": found.share, "n": found.n} for metric, found in figures.shares.items()}
    return {"n": figures.n, "score": figures.score, **shares}
