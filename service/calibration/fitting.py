"""From measured pairs to the bins of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cache.latent.policy import Bins
from service.calibration.measuring import Verdicts
from service.calibration.pairs import MIN_PAIRS

SCORE = "score"
DECIDING = (SCORE, "all")


def quality(verdicts: Mapping[int, Verdicts], places: Sequence[Sequence[int]]) -> dict[int, list[float | None]]:
    """Row K -> quality relative to from-scratch pictures, bin by bin; None where a bin has too few pairs.

    It is the lower of the mean score's and of the share of pictures without a fault. More similar prompts cannot do
    worse, so that bins in which they do by chance are pooled with those below (isotonic regression by pooling adjacent
    violators, each bin with the weight of its from-scratch pictures).

    Args:
        places: of each bin's pairs in the verdicts.
    """
    found: dict[int, list[float | None]] = {}
    for row in verdicts:
        curves = []
        for metric in DECIDING:
            sums = []
            for bin in places:
                told = [place for place in bin if verdicts[0][metric][place] is not None]
                sums.append((_total(verdicts[row][metric], told), _total(verdicts[0][metric], told)))
            if metric == SCORE or any(scratch > 0 for _, scratch in sums):
                fit = [len(bin) >= MIN_PAIRS for bin in places]
                curves.append(_spread(rising([pair for pair, enough in zip(sums, fit, strict=True) if enough]), fit))
        found[row] = [
            min((value for value in values if value is not None), default=None) for values in zip(*curves, strict=True)
        ]
    return found


def rising(sums: Sequence[tuple[float, float]]) -> list[float]:
    """Ratios of the (part, whole) sums, neighbours pooled where they would fall."""
    blocks: list[tuple[float, float, int]] = []  # part, whole, bins
    for part, whole in sums:
        blocks.append((part, whole, 1))
        while len(blocks) > 1 and blocks[-1][0] * blocks[-2][1] <= blocks[-2][0] * blocks[-1][1]:
            last, before = blocks.pop(), blocks.pop()
            blocks.append((before[0] + last[0], before[1] + last[1], before[2] + last[2]))
    return [part / whole if whole > 0 else 0.0 for part, whole, bins in blocks for _ in range(bins)]


def fit(
    edges: Sequence[float], qualities: Mapping[int, Sequence[float | None]], alphas: Mapping[int, float], target: float
) -> Bins:
    """For each bin the alpha of the deepest row K that it, and every row before it, keeps the target.

    A bin of which too little is known allows what the one below it allows.

    Args:
        edges: least similarity of each bin.
        alphas: row K -> alpha.
    """
    bins: list[tuple[float, float]] = []
    for place, edge in enumerate(edges):
        deepest = None
        for row, alpha in sorted(alphas.items()):
            value = qualities[row][place]
            if value is None or value < target:
                break
            deepest = alpha
        if deepest is not None and (not bins or deepest > bins[-1][1]):
            bins.append((edge, deepest))
    return tuple(bins)


def _total(values: Sequence[float | None], places: Sequence[int]) -> float:
    return sum(value for place in places if (value := values[place]) is not None)


def _spread(values: Sequence[float], fit: Sequence[bool]) -> list[float | None]:
    """The values at the places that are fit, None at the others."""
    rest = iter(values)
    return [next(rest) if each else None for each in fit]
