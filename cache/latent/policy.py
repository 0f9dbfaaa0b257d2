"""How deep a prompt of a given similarity may start, by measurement or, failing that, by NIRVANA's thresholds."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Bins = tuple[tuple[float, float], ...]  # (least similarity, deepest alpha allowed from it on), ascending in similarity

STEPS = 50  # of the schedule that K counts in
_FORMAT = 1
_SAME_LEVEL = 1e-6  # lets an alpha that went through float32 enter at the row that it came from
# NIRVANA (arXiv 2312.04429): similarity of the prompts -> K, the steps of 50 that the latent has behind it.
_NIRVANA = ((0.65, 5), (0.75, 10), (0.85, 15), (0.90, 20), (0.95, 25))


class PolicyError(ValueError):
    """A policy that cannot be read; the message says what is wrong with it, in one line."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Bins for each family of samplers; a family without bins never starts from the cache.

    families: "solver" (DDIM, Euler, DPM++ and their kin), "lcm", "consistency".
    levels: alpha of each K, the signal scale that a latent has after K of 50 steps; K counts what a level is worth.
    source: where the bins come from, for the log: "calibrated" or "NIRVANA".
    target: quality relative to from-scratch pictures that the bins were chosen to keep; None for published thresholds.
    figures: what was measured on the way; kept with the policy, never read here.
    fresh: for a family, the least share of a start's variance that has to be noise of the request's own seed; none
        unless named here. Without it, all that start from one latent with a solver that adds no noise are one picture.
        It costs rows: the plan is entered earlier than the latent would allow.
    """

    families: Mapping[str, Bins]
    levels: Mapping[int, float]
    source: str
    target: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    fresh: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ordered = sorted(self.levels)
        alphas = [self.levels[k] for k in ordered]
        if not ordered or not 0 < ordered[0] <= ordered[-1] < STEPS:
            raise PolicyError(f"levels: K has to be between 1 and {STEPS - 1}")
        if not all(0 < alpha < 1 for alpha in alphas) or sorted(set(alphas)) != alphas:
            raise PolicyError("levels: alphas have to grow with K, between 0 and 1")
        for family, bins in self.families.items():
            least = [similarity for similarity, _ in bins]
            if sorted(set(least)) != least or not all(-1 <= similarity <= 1 for similarity in least):
                raise PolicyError(f"families.{family}: similarities have to ascend, between -1 and 1")
            if not all(0 < alpha < 1 for _, alpha in bins):
                raise PolicyError(f"families.{family}: alphas have to be between 0 and 1")

        for family, share in self.fresh.items():
            if not 0 <= share < 1:
                raise PolicyError(f"fresh.{family}: {share:g} is not allowed; from 0 to below 1")

    def deepest(self, family: str, similarity: float) -> float | None:
        """The greatest alpha that a latent of a prompt this similar may have; None: draw from scratch."""
        bins = self.families.get(family, ())
        place = bisect_right(bins, similarity, key=lambda bin: bin[0])
        return bins[place - 1][1] if place else None

    def steps(self, alpha: float) -> float:
        """What a level is worth: steps of 50 behind a latent of this alpha, interpolated between the known K."""
        ordered = sorted(self.levels)
        return float(np.interp(alpha, [0, *(self.levels[k] for k in ordered), 1], [0, *ordered, STEPS]))

    def save(self, path: Path) -> None:
        content = {
            "format": _FORMAT,
            "source": self.source,
            "target": self.target,
            "levels": {str(k): alpha for k, alpha in self.levels.items()},
            "families": {family: [list(bin) for bin in bins] for family, bins in self.families.items()},
            "figures": dict(self.figures),
            "fresh": dict(self.fresh),
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Raises PolicyError for a file that is not a policy, OSError for one that cannot be read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise PolicyError(f"format {content['format']!r} is unknown; this version reads {_FORMAT}")
            return cls(
                families={
                    family: tuple((float(similarity), float(alpha)) for similarity, alpha in bins)
                    for family, bins in content["families"].items()
                },
                levels={int(k): float(alpha) for k, alpha in content["levels"].items()},
                source=str(content["source"]),
                target=None if content["target"] is None else float(content["target"]),
                figures=dict(content["figures"]),
                fresh={family: float(share) for family, share in content.get("fresh", {}).items()},
            )
        except KeyError as error:
            raise PolicyError(f"{path}: {error} is missing") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise PolicyError(f"{path}: {error}") from None


def entry(levels: Iterable[float], rows: Sequence[float], deepest: float, fresh: float) -> tuple[float, int] | None:
    """The level of a prompt's latents to start from, and the row at which the plan is entered; None: from scratch.

    The row is the last one that is not past `deepest` and leaves at least the share `fresh` of the variance to noise.

    Args:
        levels: alphas that there are latents of, ascending. rows: alpha of each row of the plan, ascending.
        deepest, fresh: of the policy.
    """
    kept = math.sqrt(1 - fresh)  # of a latent's signal, at most
    # A level past the deepest is of use only where it makes room for fresh noise.
    entered = {
        alpha: _row_at(rows, min(deepest, kept * alpha))
        for alpha in levels
        if fresh > 0 or alpha <= deepest + _SAME_LEVEL
    }
    row = max(entered.values(), default=0)
    if row < 1:
        return None
    # Of the levels that enter at one row, the noisiest needs least re-noising.
    return next(alpha for alpha in entered if entered[alpha] == row), row


def _row_at(rows: Sequence[float], alpha: float) -> int:
    """The last row whose input is at least as noisy as a latent of this alpha; -1 if none is."""
    return bisect_right(rows, alpha + _SAME_LEVEL) - 1


def nirvana(alphas_of_k: Mapping[int, float]) -> Policy:
    """NIRVANA's published thresholds, for a model that nobody has calibrated; solvers only.

    alphas_of_k: the model's signal scale after K of 50 steps, for K = 5, 10, 15, 20 and 25 at least.
    """
    bins = tuple((similarity, alphas_of_k[k]) for similarity, k in _NIRVANA)
    return Policy(families={"solver": bins}, levels=dict(alphas_of_k), source="NIRVANA")
