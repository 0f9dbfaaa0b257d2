from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.latent.policy import Policy
from service.calibration.fitting import fit, quality, rising
from service.calibration.pairs import MIN_PAIRS

EDGES = (-1.0, 0.5, 0.9)
ALPHAS = {5: 0.1, 10: 0.3, 15: 0.6}
SHARES = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=12)


def test_neighbours_that_fall_are_pooled() -> None:
    assert rising([(1, 10), (8, 10), (2, 10), (9, 10)]) == [0.1, 0.5, 0.5, 0.9]
    assert rising([(3, 10), (1, 30)]) == [0.1, 0.1]
    assert rising([(0, 0), (1, 2)]) == [0.5, 0.5]


@given(SHARES)
def test_pooled_ratios_rise_and_keep_the_total(sums: list[tuple[int, int]]) -> None:
    ratios = rising(sums)
    assert ratios == sorted(ratios)
    expected = sum(whole * ratio for (_, whole), ratio in zip(sums, ratios, strict=True))
    assert expected == pytest.approx(sum(part for part, _ in sums))


def verdicts(scores: list[float], right: list[float | None]) -> dict[str, list[float | None]]:
    return {"score": [each for each in scores for _ in range(MIN_PAIRS)], "all": [r for r in right for _ in range(10)]}


PLACES = [list(range(at, at + MIN_PAIRS)) for at in (0, 10, 20)]


def test_quality_is_the_worse_of_score_and_share() -> None:
    found = quality({0: verdicts([0.8, 0.8, 0.8], [1, 1, 1]), 5: verdicts([0.4, 0.8, 0.8], [1, 0, 1])}, [*PLACES])
    assert found[0] == [1, 1, 1]
    assert found[5] == [pytest.approx(0.5), 0.5, pytest.approx(1)]


def test_records_that_say_nothing_leave_the_score() -> None:
    found = quality({0: verdicts([0.8] * 3, [None] * 3), 5: verdicts([0.4] * 3, [None] * 3)}, PLACES)
    assert found[5] == [pytest.approx(0.5)] * 3


def test_a_bin_of_few_pairs_has_no_quality_and_allows_what_the_one_below_does() -> None:
    places = [PLACES[0], PLACES[1][: MIN_PAIRS - 1], PLACES[2]]
    found = quality({0: verdicts([0.8] * 3, [1] * 3), 5: verdicts([0.8] * 3, [1] * 3)}, places)
    assert found[5] == [1, None, 1]
    policy = Policy({"solver": fit(EDGES, found, {5: 0.1}, 0.97)}, ALPHAS, "calibrated")
    assert [policy.deepest("solver", similarity) for similarity in (-1, 0.6, 0.95)] == [0.1, 0.1, 0.1]


def test_the_deepest_row_that_it_and_all_before_it_keep() -> None:
    qualities = {5: [0.98, 0.98, 1.0], 10: [0.9, 0.9, 0.99], 15: [0.98, 0.98, 0.97]}
    assert fit(EDGES, qualities, ALPHAS, 0.97) == ((-1.0, 0.1), (0.9, 0.6))
    assert fit(EDGES, qualities, ALPHAS, 1.0) == ((0.9, 0.1),)


def test_nothing_is_allowed_where_nothing_is_good_enough() -> None:
    assert fit(EDGES, {5: [0.5, None, 0.9]}, {5: 0.1}, 0.97) == ()


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=3, max_size=3), st.floats(0.1, 1))
def test_more_similar_prompts_never_start_less_deep(values: list[list[float]], target: float) -> None:
    qualities = dict(zip(ALPHAS, map(sorted, values), strict=True))
    policy = Policy({"solver": fit(EDGES, qualities, ALPHAS, target)}, ALPHAS, "calibrated")
    depths = [policy.deepest("solver", similarity) or 0 for similarity in EDGES]
    assert depths == sorted(depths)
