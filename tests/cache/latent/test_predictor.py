from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cache.latent.predictor import MatchPredictor

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def around(centre: int, count: int, seed: int) -> Vectors:
    """Unit vectors [count, 32] about one of a few directions."""
    noise = np.random.default_rng(seed).standard_normal((count, 32)) * 0.05
    vectors = np.random.default_rng(centre).standard_normal(32) / 32**0.5 + noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def trained(**options: Any) -> MatchPredictor:
    predictor = MatchPredictor(every=200, **options)
    for embedding in around(1, 200, seed=5):
        predictor.matched(embedding)
    assert predictor.settle(60.0)
    return predictor


def test_it_lets_everything_through_until_it_is_trained() -> None:
    predictor = MatchPredictor(every=200)
    for embedding in around(1, 199, seed=5):
        predictor.matched(embedding)
    assert all(predictor.may_match(embedding) for embedding in around(2, 50, seed=6))


def test_it_tells_what_matches_from_what_does_not() -> None:
    predictor = trained(explore=0.0)
    assert np.mean([predictor.may_match(embedding) for embedding in around(1, 200, seed=7)]) >= 0.8
    assert not any(predictor.may_match(embedding) for embedding in around(2, 200, seed=8))


def test_some_go_through_all_the_same() -> None:
    predictor = trained(explore=0.2)
    assert np.mean([predictor.may_match(embedding) for embedding in around(2, 500, seed=8)]) == pytest.approx(
        0.2, abs=0.06
    )


def test_it_follows_what_matches_now() -> None:
    predictor = trained(capacity=200, explore=0.0)
    for embedding in around(2, 200, seed=9):
        predictor.matched(embedding)
    assert predictor.settle(60.0)
    assert np.mean([predictor.may_match(embedding) for embedding in around(2, 200, seed=10)]) >= 0.8
    assert not any(predictor.may_match(embedding) for embedding in around(1, 200, seed=11))


@pytest.mark.parametrize("wrong", [0.05, 0.3])
def test_it_rejects_as_many_matching_prompts_as_it_may(wrong: float) -> None:
    predictor = MatchPredictor(every=1000, wrong=wrong, explore=0.0)
    for embedding in around(1, 1000, seed=5):
        predictor.matched(embedding)
    assert predictor.settle(60.0)
    rejected = np.mean([not predictor.may_match(embedding) for embedding in around(1, 1000, seed=7)])
    assert rejected == pytest.approx(wrong, abs=0.06)


def test_it_does_not_shrink_to_what_it_let_through() -> None:
    """Only what passes is ever seen to match; over many trainings the share rejected must not grow."""
    predictor = MatchPredictor(capacity=400, every=100, wrong=0.1)
    rejected = 0
    for i, embedding in enumerate(around(1, 4000, seed=5)):
        passed = predictor.may_match(embedding)
        rejected += not passed and i >= 3000
        if passed:
            predictor.matched(embedding)
            assert predictor.settle(60.0)
    assert rejected / 1000 < 0.25


def test_one_embedding_again_and_again_is_no_trouble() -> None:
    predictor = MatchPredictor(every=50, explore=0.0)
    (embedding,) = around(1, 1, seed=5)
    for _ in range(50):
        predictor.matched(embedding)
    assert predictor.settle(60.0)
    assert predictor.may_match(embedding)
    assert not any(predictor.may_match(other) for other in around(2, 20, seed=6))
