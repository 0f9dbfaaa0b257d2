"""The noise schedule: sigma and timestep are two names of one level."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.training.schedule import SIGMA_MAX, STEPS, NoiseLevels, alphas_cumprod, karras

CPU = torch.device("cpu")
LEVELS = NoiseLevels(CPU)


def test_whole_timesteps_have_the_sigma_of_their_alpha() -> None:
    alpha = alphas_cumprod(CPU)[:-1].double()
    timesteps = torch.arange(STEPS - 1).float()
    torch.testing.assert_close(LEVELS.sigma(timesteps), ((1 - alpha) / alpha).sqrt().float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(LEVELS.timestep(LEVELS.sigma(timesteps)), timesteps, rtol=0, atol=1e-2)


@given(st.floats(0, STEPS - 2))
def test_timestep_to_sigma_and_back(timestep: float) -> None:
    there = LEVELS.sigma(torch.tensor([timestep]))
    assert float(LEVELS.timestep(there)) == pytest.approx(timestep, abs=1e-2)


@given(st.floats(0.03, SIGMA_MAX))
def test_sigma_to_timestep_and_back(sigma: float) -> None:
    assert float(LEVELS.sigma(LEVELS.timestep(torch.tensor([sigma])))) == pytest.approx(sigma, rel=1e-4)


def test_the_ends_are_within_the_timesteps() -> None:
    assert float(LEVELS.timestep(torch.tensor([LEVELS.low]))) == 0.0
    assert 900 < float(LEVELS.timestep(torch.tensor([SIGMA_MAX]))) < STEPS - 2


def test_karras_levels() -> None:
    got = karras(10, LEVELS.low)
    assert got[0] == SIGMA_MAX
    assert got[-1] == LEVELS.low
    expected = np.linspace(80 ** (1 / 7), LEVELS.low ** (1 / 7), 10) ** 7
    np.testing.assert_allclose(got, expected, rtol=1e-6)
