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


def test_its_verdict_is_scikit_learns() -> None:
    from sklearn.svm import OneClassSVM

    sample = around(1, 200, seed=5)
    predictor = trained(explore=0.0)
    gamma = 1.0 / (float(sample.var()) * sample.shape[1])
    reference = OneClassSVM(nu=0.05, gamma=gamma).fit(sample)
    probes = np.concatenate([around(1, 100, seed=12), around(2, 100, seed=13), around(3, 20, seed=14)])
    margins = reference.decision_function(probes)
    clear = np.abs(margins) > 1e-3 * abs(reference.offset_[0])
    assert clear.mean() > 0.9
    verdicts = np.array([predictor.may_match(probe) for probe in probes])
    assert (verdicts[clear] == (margins[clear] >= 0)).all()


def test_one_embedding_again_and_again_is_no_trouble() -> None:
    predictor = MatchPredictor(every=50, explore=0.0)
    (embedding,) = around(1, 1, seed=5)
    for _ in range(50):
        predictor.matched(embedding)
    assert predictor.settle(60.0)
    assert predictor.may_match(embedding)
    assert not any(predictor.may_match(other) for other in around(2, 20, seed=6))
