"""Embeddings and readings: shapes, norms, and that batches do not matter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.scorer import Scorer, load_scorer
from tests.models.scorer.small import SIZES, WORDS, parts, record


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return load_scorer(*parts(folder), "cpu")


def pictures(count: int, side: int = SIZES.side) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(4)) * 2 - 1


def test_text_embeddings_are_unit_vectors_whatever_the_batch(scorer: Scorer) -> None:
    prompts = [f"a {'red ' * (index % 4)}cat" for index in range(40)]
    together = scorer.embed_text(prompts)
    assert together.shape == (40, SIZES.embed)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(40))
    alone = torch.cat([scorer.embed_text([prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert scorer.embed_text([]).shape == (0, SIZES.embed)


def test_readings_have_their_shapes_whatever_the_batch(scorer: Scorer) -> None:
    seen = scorer.read(pictures(35))
    patches = SIZES.cells**2
    assert seen.embedding.shape == (35, SIZES.embed)
    assert seen.features.shape == (35, SIZES.width)
    assert seen.concept.shape == seen.cover.shape == seen.density.shape == (35, patches)
    assert seen.tint.shape == (35, patches, len(WORDS.tints))
    torch.testing.assert_close(seen.embedding.norm(dim=1), torch.ones(35))
    assert 0 <= float(seen.cover.min()) <= float(seen.cover.max()) <= 1
    alone = scorer.read(pictures(35)[7:8])
    for all_of_it, one in zip(seen, alone, strict=True):
        torch.testing.assert_close(all_of_it[7:8], one, rtol=1e-3, atol=1e-3)


def test_larger_pictures_are_resized(scorer: Scorer) -> None:
    smooth = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64)
    half = torch.nn.functional.interpolate(smooth, size=(32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(scorer.read(smooth).embedding, scorer.read(half).embedding, rtol=0, atol=1e-5)


def test_nearest_concepts_are_ranked_by_their_names_embeddings(scorer: Scorer) -> None:
    seen = scorer.read(pictures(3))
    ranked = scorer.concepts(seen, 3)
    closeness = (seen.embedding @ scorer.embed_text(WORDS.names).T).gather(1, ranked)
    assert (closeness.diff(dim=1) <= 1e-6).all()
    assert ranked.sort(1).values.tolist() == [[0, 1, 2]] * 3


def test_judging_gives_a_score_and_every_metric_for_every_record(scorer: Scorer) -> None:
    seen = scorer.read(pictures(2))
    found = scorer.judge(seen, [record(("cat", 2), style="flat"), record(("apple", 1), prompt="a red apple")])
    assert set(found) == {"objects", "colours", "relation", "count", "style", "background", "all", "score"}
    assert all(len(values) == 2 for values in found.values())
    expected = (seen.embedding * scorer.embed_text(["a cat", "a red apple"])).sum(1)
    torch.testing.assert_close(torch.tensor(found["score"]), expected)
    assert found["style"][1] is None
    assert found["count"] == [found["count"][0], None]
