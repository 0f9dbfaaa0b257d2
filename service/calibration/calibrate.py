"""From a model, a scorer and prompts to a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from cache.latent.policy import STEPS, Bins, Policy
from models.diffusion.model import DiffusionModel
from models.scorer import Scorer
from service.calibration.drawing import Drawing
from service.calibration.fitting import fit, quality
from service.calibration.measuring import Verdicts, families, means, measure, rows_run
from service.calibration.pairs import EDGES, Embed, bin_of, make_pairs
from service.errors import SetupError
from service.evaluation.prompts import Record

CALIBRATED = "calibrated"


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
    places: list[list[int]] = [[] for _ in EDGES]
    for place, pair in enumerate(pairs):
        places[bin_of(pair.similarity)].append(place)
    bins: dict[str, Bins] = {}
    levels: dict[int, float] = {}
    figures: dict[str, Any] = {}
    total = sum(rows_run(family, len(pairs)) for family in measured)
    with tqdm(total=total, unit="row", leave=False, disable=quiet or None) as bar:
        for family in measured:
            drawing = Drawing(model, family.sampler, family.steps, batch, bar.update)
            alphas = {row: drawing.plan().rows[row].alpha for row in family.rows}
            verdicts = measure(drawing, model, scorer, pairs, family.rows)
            qualities = quality(verdicts, places)
            bins[family.name] = fit(EDGES, qualities, alphas, target)
            levels = levels or {round(STEPS * row / family.steps): alpha for row, alpha in alphas.items()}
            figures[family.name] = {
                "sampler": family.sampler,
                "steps": family.steps,
                "guidance_scale": model.card.samplers[family.sampler].guidance_scale,
                "alphas": alphas,
                "bins": _bins(verdicts, qualities, places),
            }
    return Policy(bins, levels, CALIBRATED, target, {"pairs": len(pairs), "seed": seed, "families": figures})


def _bins(
    verdicts: Mapping[int, Verdicts], qualities: Mapping[int, Sequence[float | None]], places: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """What was measured, bin by bin and row by row."""
    return [
        {
            "similarity": edge,
            "pairs": len(members),
            "rows": {
                row: {"quality": qualities[row][bin], **means(verdicts[row], members)} for row in verdicts if members
            },
        }
        for bin, (edge, members) in enumerate(zip(EDGES, places, strict=True))
    ]
