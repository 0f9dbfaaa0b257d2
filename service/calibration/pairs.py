"""Pairs of prompts over the whole range of similarity."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.calibration.edits import EDITS, Editor, reworded
from service.evaluation.prompts import Record
from service.events import MAX_SEED

# Least similarity of each bin. The last bin is that of a prompt asked again.
EDGES = (-1.0, 0.2, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.995)
MIN_PAIRS = 10  # of a bin; fewer say nothing of it
MOST_RECORDS = 500  # 125,000 pairs are enough to choose from
SEED_STEP = 1_000_003  # from the first prompt's seed to the second's

Embed = Callable[[Sequence[str]], NDArray[np.float32]]  # prompts -> [N, D], unit norm


class Pair(NamedTuple):
    """The second prompt's picture is drawn from the first's latent, under another seed."""

    first: Record
    second: Record
    similarity: float


def bin_of(similarity: float) -> int:
    """Which bin of EDGES; a cosine that rounding took below -1 is in the first."""
    return max(int(np.searchsorted(EDGES, similarity, side="right")) - 1, 0)


def make_pairs(records: Sequence[Record], embed: Embed, per_bin: int, seed: int) -> list[Pair]:
    """Up to `per_bin` pairs of each bin, the same for the same arguments.

    Drawn from all pairs of records, and of a record with itself, with an edit of itself and with itself in other words.
    """
    draw = random.Random(seed)
    own = draw.sample(list(records), min(len(records), MOST_RECORDS))
    vectors = embed([record["prompt"] for record in own])
    cosines = vectors @ vectors.T
    firsts, seconds = np.triu_indices(len(own), 1)
    bins: list[list[Pair]] = [[] for _ in EDGES]
    places = np.maximum(np.searchsorted(EDGES, cosines[firsts, seconds], side="right") - 1, 0)
    for bin in range(len(EDGES)):
        some = np.flatnonzero(places == bin)
        for place in draw.sample(some.tolist(), min(len(some), per_bin)):
            i, j = int(firsts[place]), int(seconds[place])
            bins[bin].append(Pair(own[i], own[j], float(cosines[i, j])))
    for pair in _variants(own[: 4 * per_bin], embed, draw):
        bins[bin_of(pair.similarity)].append(pair)
    chosen = [pair for found in bins for pair in draw.sample(found, min(len(found), per_bin))]
    return [pair._replace(second=reseeded(pair.second | {"seed": pair.first["seed"]})) for pair in chosen]


def _variants(records: Sequence[Record], embed: Embed, draw: random.Random) -> list[Pair]:
    """Each record with itself, with one edit of each kind, and in other words."""
    editor = Editor(records)
    found = [
        (record, other)
        for record in records
        for other in (record, reworded(record, draw), *(editor.edit(record, draw, field) for field in EDITS))
        if other is not None
    ]
    cosines = (embed([a["prompt"] for a, _ in found]) * embed([b["prompt"] for _, b in found])).sum(1)
    return [Pair(*pair, float(cosine)) for pair, cosine in zip(found, cosines, strict=True)]


def reseeded(record: Record, times: int = 1) -> Record:
    """The record with another seed, that far from its own."""
    return record | {"seed": (record["seed"] + times * SEED_STEP) % (MAX_SEED + 1)}
