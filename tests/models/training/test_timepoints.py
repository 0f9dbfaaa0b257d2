"""The search of time points finds what it is asked for."""

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.training.schedule import SIGMA_MAX
from models.training.timepoints import STEPS, search

LOW = 0.03


def test_one_step_starts_at_the_top() -> None:
    assert search(lambda sigmas: 0.0, LOW, 1) == [SIGMA_MAX]


@given(st.floats(0.1, 40))
def test_two_steps_find_the_peak(peak: float) -> None:
    """Four rounds leave 16/81 of the interval of log sigma."""
    found = search(lambda sigmas: -abs(math.log(sigmas[1] / peak)), LOW, 2)
    assert abs(math.log(found[1] / peak)) < 16 / 81 * math.log(SIGMA_MAX / LOW)


@pytest.mark.parametrize("steps", STEPS)
@given(weights=st.lists(st.floats(-1, 1), min_size=8, max_size=8))
def test_points_fall_and_never_get_worse(steps: int, weights: list[float]) -> None:
    calls: list[float] = []

    def quality(sigmas: Sequence[float]) -> float:
        assert len(sigmas) == steps
        assert sigmas[0] == SIGMA_MAX
        assert all(after < before for before, after in itertools.pairwise(sigmas))
        assert sigmas[-1] > LOW
        calls.append(sum(w * math.sin(3 * math.log(s)) for w, s in zip(weights, sigmas, strict=False)))
        return calls[-1]

    found = search(quality, LOW, steps)
    assert len(calls) == 1 + 8 * (steps - 1)
    assert quality(found) == max(calls)
