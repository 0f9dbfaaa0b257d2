from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.latent.policy import Policy, PolicyError, nirvana

LEVELS = {5: 0.14, 10: 0.22, 15: 0.33, 20: 0.45, 25: 0.58}
CALIBRATED = Policy(
    families={"solver": ((0.7, 0.22), (0.9, 0.58)), "lcm": ((0.95, 0.33),)},
    levels=LEVELS,
    source="calibrated",
    target=0.97,
    figures={"pairs": 40},
)


@pytest.mark.parametrize(
    ("similarity", "k"),
    [(0.64, None), (0.66, 5), (0.76, 10), (0.86, 15), (0.91, 20), (0.96, 25), (1.0, 25), (-1.0, None)],
)
def test_nirvanas_thresholds(similarity: float, k: int | None) -> None:
    policy = nirvana(LEVELS)
    assert policy.deepest("solver", similarity) == (None if k is None else LEVELS[k])
    assert policy.source == "NIRVANA"


@pytest.mark.parametrize("family", ["lcm", "consistency", "unknown"])
def test_nirvana_says_nothing_of_few_step_samplers(family: str) -> None:
    assert nirvana(LEVELS).deepest(family, 1.0) is None


def test_each_family_has_its_own_bins() -> None:
    assert CALIBRATED.deepest("solver", 0.93) == 0.58
    assert CALIBRATED.deepest("lcm", 0.93) is None
    assert CALIBRATED.deepest("lcm", 0.95) == 0.33


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_no_bin_reaches_below_its_least_similarity(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert (CALIBRATED.deepest("solver", low) or 0) <= (CALIBRATED.deepest("solver", high) or 0)


def test_a_level_is_worth_its_k() -> None:
    assert [CALIBRATED.steps(alpha) for alpha in LEVELS.values()] == list(LEVELS)
    assert 5 < CALIBRATED.steps(0.18) < 10
    assert CALIBRATED.steps(0.99) < 50


def test_a_policy_comes_back_from_its_file(tmp_path: Path) -> None:
    for policy in (CALIBRATED, replace(CALIBRATED, fresh={"solver": 0.25})):
        policy.save(tmp_path / "policy.json")
        assert Policy.load(tmp_path / "policy.json") == policy


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"levels": {}},
        {"levels": {"0": 0.1}},
        {"levels": {"50": 0.1}},
        {"levels": {"5": 0.3, "10": 0.2}},
        {"families": {"solver": [[0.9, 0.2], [0.8, 0.3]]}},
        {"families": {"solver": [[0.9, 1.0]]}},
        {"families": {"solver": [[1.1, 0.5]]}},
        {"families": {"solver": [[0.9]]}},
        {"families": []},
        {"target": "high"},
        {"figures": 3},
        {"fresh": {"solver": 1.0}},
        {"fresh": {"solver": -0.1}},
        {"fresh": {"solver": "much"}},
        {"fresh": [0.1]},
    ],
)
def test_a_file_that_is_no_policy_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "policy.json"
    CALIBRATED.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PolicyError):
        Policy.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '"policy"'])
def test_text_that_is_no_policy_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(PolicyError):
        Policy.load(tmp_path / "policy.json")
