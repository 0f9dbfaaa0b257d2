from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from service.calibration.pairs import EDGES, bin_of, make_pairs
from tests.service.calibration.test_edits import record, thing

RECORDS = [
    record(
        f"a {colour} {name} on a {ground} background",
        objects=[thing(name, colour)],
        background={"ground": "plain", "colours": [ground]},
        seed=seed,
    )
    for seed, (name, colour, ground) in enumerate(
        (name, colour, ground)
        for name in ("apple", "cat", "dog", "fox")
        for colour in ("red", "blue")
        for ground in ("mint", "pink")
    )
]


def embed(prompts: Sequence[str]) -> np.ndarray:
    """Bags of words."""
    vectors = np.zeros((len(prompts), 64), np.float32)
    for vector, prompt in zip(vectors, prompts, strict=True):
        for word in prompt.replace(",", "").split():
            vector[sum(map(ord, word)) % 64] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_pairs_are_spread_over_the_bins_and_as_similar_as_they_say() -> None:
    pairs = make_pairs(RECORDS, embed, 5, seed=0)
    counts = Counter(bin_of(pair.similarity) for pair in pairs)
    assert len(counts) >= 4
    assert max(counts.values()) == 5
    again = (embed([p.first["prompt"] for p in pairs]) * embed([p.second["prompt"] for p in pairs])).sum(1)
    assert np.allclose(again, [pair.similarity for pair in pairs])
    same = [pair for pair in pairs if pair.first["prompt"] == pair.second["prompt"]]
    assert same
    assert {bin_of(pair.similarity) for pair in same} == {len(EDGES) - 1}


def test_the_second_picture_has_another_seed() -> None:
    assert all(pair.first["seed"] != pair.second["seed"] for pair in make_pairs(RECORDS, embed, 5, seed=0))


def test_the_seed_decides() -> None:
    assert make_pairs(RECORDS, embed, 5, seed=1) == make_pairs(RECORDS, embed, 5, seed=1)
    assert make_pairs(RECORDS, embed, 5, seed=1) != make_pairs(RECORDS, embed, 5, seed=2)


@pytest.mark.parametrize(("similarity", "bin"), [(-1.0000001, 0), (-1.0, 0), (0.2, 1), (0.94999, 10), (1.0000001, 12)])
def test_bin_of(similarity: float, bin: int) -> None:
    assert bin_of(similarity) == bin
