"""From a model, a scorer and prompts to a policy."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from cache.latent.policy import STEPS, Bins, Policy, entry
from models.diffusion.model import DiffusionModel
from models.scorer import Scorer
from service.caching import kept_rows, levels_of
from service.calibration.diversity import PICTURES, PROMPTS, Answers
from service.calibration.drawing import Drawing, Start
from service.calibration.fitting import fit, quality
from service.calibration.measuring import Family, Seconds, Verdicts, families, means, rows_run
from service.calibration.pairs import EDGES, Embed, Pair, bin_of, make_pairs
from service.errors import SetupError
from service.evaluation.prompts import Record

CALIBRATED = "calibrated"
DIVERSE = 0.5  # least distance among ten pictures of one prompt from the cache, relative to ten from scratch
SHARES = tuple(share / 20 for share in range(20))  # of fresh noise, that are tried


class Fitted(NamedTuple):
    """What a family of samplers may do. levels: K -> alpha."""

    bins: Bins
    fresh: float
    levels: dict[int, float]
    figures: dict[str, Any]


def calibrate(
    model: DiffusionModel,
    scorer: Scorer,
    embed: Embed,
    records: Sequence[Record],
    *,
    target: float,
    per_bin: int,
    seed: int,
    batch: int,
    quiet: bool = True,
) -> Policy:
    """Draw pairs of prompts, the second from the first's latents, and allow what keeps the target.

    Where pictures of one prompt would be too much alike, starts get noise of their own, and all is measured with it.

    Args:
        embed: as the cache that will read the policy embeds prompts; a policy means nothing under another.
        target: of `fitting.quality`.
        per_bin: pairs of each bin of similarity, at most.
        batch: pictures of one network call.

    Raises:
        SetupError: the model has no sampler that could start late.
        NonFiniteError: the network returned what is not a number.
    """
    measured = families(model.card)
    if not measured:
        raise SetupError(f"--model: {model.card.name} has no sampler that could start from a latent")
    pairs = make_pairs(records, embed, per_bin, seed)
    again = random.Random(seed).sample(list(records), min(len(records), PROMPTS))
    found: dict[str, Fitted] = {}
    total = sum(rows_run(family, len(pairs), len(again)) for family in measured)
    with tqdm(total=total, unit="row", leave=False, disable=quiet or None) as bar:
        for family in measured:
            drawing = Drawing(model, family.sampler, family.steps, batch, bar.update)
            found[family.name] = _Fitting(model, scorer, drawing, family, pairs, again, target).fitted()
    return Policy(
        families={name: family.bins for name, family in found.items()},
        levels=next(iter(found.values())).levels,
        source=CALIBRATED,
        target=target,
        figures={
            "pairs": len(pairs),
            "seed": seed,
            "families": {name: family.figures for name, family in found.items()},
        },
        fresh={name: family.fresh for name, family in found.items()},
    )


class _Fitting:
    """Finds what one family of samplers may do."""

    def __init__(
        self,
        model: DiffusionModel,
        scorer: Scorer,
        drawing: Drawing,
        family: Family,
        pairs: Sequence[Pair],
        again: Sequence[Record],
        target: float,
    ) -> None:
        self._family, self._target = family, target
        self._guidance = model.card.samplers[family.sampler].guidance_scale
        plan = drawing.plan()
        self._alphas = [row.alpha for row in plan.rows]
        self._stored = kept_rows(plan, levels_of(model).values())  # by a server
        rows = sorted({*family.rows, *self._stored})
        self._seconds = Seconds(drawing, model, scorer, pairs, rows)
        self._answers = Answers(drawing, model, scorer, again, self._stored)
        self._prompts = len(again)
        self._places: list[list[int]] = [[] for _ in EDGES]
        for place, pair in enumerate(pairs):
            self._places[bin_of(pair.similarity)].append(place)

    def fitted(self) -> Fitted:
        """Bins that keep the target with the least share of fresh noise that makes a prompt's pictures differ enough.

        More noise changes the bins, and other bins may need more noise: repeated until the share is enough for them.
        """
        fresh, enough = 0.0, False
        tables: list[dict[str, Any]] = []
        tried: dict[float, dict[str, Any]] = {}
        while not enough:
            bins, table = self._bins(fresh)
            tables.append(table)
            shares = self._shares(bins, fresh)
            tried |= shares
            needed = max(shares, default=fresh)
            enough, fresh = needed == fresh, needed
        alphas = {row: self._alphas[row] for row in self._family.rows}
        figures = {
            "sampler": self._family.sampler,
            "steps": self._family.steps,
            "guidance_scale": self._guidance,
            "alphas": alphas,
            "stored": self._stored,
            "measured": tables,
            "diversity": {
                "prompts": self._prompts,
                "pictures": PICTURES,
                "scratch": self._answers.scratch,
                "shares": list(tried.values()),
            },
        }
        levels = {round(STEPS * row / self._family.steps): alpha for row, alpha in alphas.items()}
        return Fitted(bins, fresh, levels, figures)

    def _bins(self, fresh: float) -> tuple[Bins, dict[str, Any]]:
        """The bins that keep the target with a share of fresh noise, and what was measured for them."""
        starts = self._starts(fresh)
        verdicts = self._seconds.verdicts(starts)
        qualities = quality(verdicts, self._places)
        bins = fit(EDGES, qualities, {k: self._alphas[k] for k in starts}, self._target)
        rows = []
        for place, (edge, members) in enumerate(zip(EDGES, self._places, strict=True)):
            deepest = max((alpha for least, alpha in bins if least <= edge), default=None)
            start = None if deepest is None else self._entry(deepest, fresh)
            rows.append(
                {
                    "similarity": edge,
                    "pairs": len(members),
                    "rows": _figures(verdicts, qualities, place, members),
                    "allowed": None if deepest is None else self._alphas.index(deepest),
                    "skipped": 0 if start is None else start.row,
                }
            )
        return bins, {"fresh": fresh, "starts": {k: start._asdict() for k, start in starts.items()}, "bins": rows}

    def _starts(self, fresh: float) -> dict[int, Start]:
        """K -> where a picture starts that may start at K; without those that the noise keeps from being reached.

        Without noise, K beyond what a plan of this sampler leaves is measured too: shorter plans leave deeper latents.
        """
        if not fresh:
            return {k: Start(k, k) for k in self._family.rows}
        starts: dict[int, Start] = {}
        for k in self._family.rows:
            start = self._entry(self._alphas[k], fresh)
            if start is not None and start not in starts.values():
                starts[k] = start
        return starts

    def _entry(self, deepest: float, fresh: float) -> Start | None:
        """Where the cache lets a picture start, all stored levels being there."""
        found = entry([self._alphas[row] for row in self._stored], self._alphas, deepest, fresh)
        return None if found is None else Start(self._alphas.index(found[0]), found[1])

    def _shares(self, bins: Bins, least: float) -> dict[float, dict[str, Any]]:
        """What shares of fresh noise, from `least` on, do for a prompt asked again, up to the first that does enough.

        All that there are if none does; none where a prompt asked again is drawn from scratch.
        """
        tried: dict[float, dict[str, Any]] = {}
        for share in SHARES[SHARES.index(least) :] if bins else ():
            start = self._entry(bins[-1][1], share)
            distance = self._answers.scratch if start is None else self._answers.distance(start)
            ratio = distance / self._answers.scratch
            tried[share] = {"fresh": share, "start": start and start._asdict(), "distance": distance, "ratio": ratio}
            if ratio >= DIVERSE:
                break
        return tried


def _figures(
    verdicts: Mapping[int, Verdicts],
    qualities: Mapping[int, Sequence[float | None]],
    bin: int,
    members: Sequence[int],
) -> dict[int, dict[str, Any]]:
    """What was measured of a bin, row by row."""
    return {row: {"quality": qualities[row][bin], **means(verdicts[row], members)} for row in verdicts if members}
