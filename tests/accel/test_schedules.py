"""Noise schedules: reading configurations, and the way from timesteps to signal scales and back."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.samplers.betas import BETA_SCHEDULES
from accel.samplers.schedules import ConsistencySchedule, LatentConsistencySchedule, NoiseSchedule, spaced_timesteps

SD_CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD = NoiseSchedule.from_config(SD_CONFIG)
CONSISTENCY = ConsistencySchedule.create()
LATENT = LatentConsistencySchedule.on(
    NoiseSchedule.from_betas("scaled_linear", 0.00085, 0.012, rescale_zero_snr=True),
    0.029167,
    80.0,
    {1: (80.0,), 2: (80.0, 1.5)},
)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("total", [100, 1000])
def test_alphas_equal_diffusers(beta_schedule: str, zero_snr: bool, total: int) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr, num_train_timesteps=total
    )
    schedule = NoiseSchedule.from_betas(beta_schedule, num_train_timesteps=total, rescale_zero_snr=zero_snr)
    assert torch.equal(torch.tensor(schedule.alphas_cumprod), scheduler.alphas_cumprod.double())
    assert (schedule.alphas_cumprod[-1] == 0) == zero_snr
    assert np.isfinite(schedule.sigmas).all()


def test_trained_betas_are_used() -> None:
    betas = [0.1, 0.2, 0.3]
    schedule = NoiseSchedule.from_config(SD_CONFIG | {"trained_betas": betas})
    assert schedule.alphas_cumprod == pytest.approx([0.9, 0.72, 0.504], rel=1e-6)


def test_a_configuration_file_is_read() -> None:
    assert (SD.set_alpha_to_one, SD.steps_offset, len(SD)) == (False, 1, 1000)
    lcm = diffusers.LCMScheduler(original_inference_steps=25, timestep_scaling=4.0)
    schedule = NoiseSchedule.from_config(dict(lcm.config))
    assert (schedule.original_inference_steps, schedule.timestep_scaling) == (25, 4.0)
    cm = NoiseSchedule.from_config(
        {"_class_name": "CMStochasticIterativeScheduler", **diffusers.CMStochasticIterativeScheduler().config}
    )
    assert isinstance(cm, ConsistencySchedule)
    assert (cm.sigma_min, cm.sigma_max, cm.sigma_data, cm.rho, len(cm)) == (0.002, 80.0, 0.5, 7.0, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "cubic"}, "beta_schedule: 'cubic' is unknown; allowed: linear, scaled_linear"),
        ({"beta_schedule": None}, "beta_schedule: None; allowed: a str"),
        ({"beta_start": "small"}, "beta_start: 'small'; allowed: a float"),
        ({"num_train_timesteps": 1000.5}, "num_train_timesteps: 1000.5; allowed: a int"),
        ({"num_train_timesteps": True}, "num_train_timesteps: True"),
        ({"num_train_timesteps": 1}, "alphas_cumprod"),
        ({"beta_start": -0.1}, "beta_start: -0.1; allowed: above 0, up to beta_end = 0.012"),
        ({"trained_betas": [0.1, 0.0]}, "alphas_cumprod: not strictly decreasing"),
        ({"thresholding": True}, "thresholding: True is not supported; allowed: False"),
        ({"prediction_type": "flow_prediction"}, "prediction_type: 'flow_prediction'.*allowed: epsilon"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type: 'sigma_min'.*allowed: zero"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped: -5.1"),
        ({"timestep_type": "continuous"}, "timestep_type: 'continuous'"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(SD_CONFIG | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_min": 90.0}, "sigma_min: 90.0; allowed: above 0 and below sigma_max = 80.0"),
        ({"s_noise": 1.01}, "s_noise: 1.01"),
        ({"num_train_timesteps": 1}, "num_train_timesteps: 1; allowed: at least 2"),
        ({"rho": None}, "rho: None; allowed: a float"),
    ],
)
def test_a_consistency_configuration_is_checked(change: dict[str, object], message: str) -> None:
    config = {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": 40,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
        "rho": 7.0,
    }
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(config | change)


@pytest.mark.parametrize("timesteps", [(0, 22), (22, 22), (40, 0), (3, -1)])
def test_explicit_timesteps_must_fall_within_the_schedule(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"timesteps:.*strictly decreasing indices from 39 to 0"):
        ConsistencySchedule.create(timesteps=timesteps)


@given(st.floats(0, 999))
def test_alpha_of_a_timestep_and_back(t: float) -> None:
    for schedule in (SD, NoiseSchedule.from_betas("scaled_linear", 0.00085, 0.012, rescale_zero_snr=True)):
        assert schedule.timestep_at(schedule.alpha_at(t)) == pytest.approx(t, abs=1e-6)
    assert SD.alpha_at(round(t)) == pytest.approx(math.sqrt(SD.alphas_cumprod[round(t)]))


@given(st.floats(0.002, 80))
def test_alpha_of_a_consistency_timestep_and_back(sigma: float) -> None:
    t = 250 * math.log(sigma)
    assert CONSISTENCY.alpha_at(t) == pytest.approx(1 / math.sqrt(1 + sigma**2))
    assert CONSISTENCY.timestep_at(CONSISTENCY.alpha_at(t)) == pytest.approx(t, abs=1e-3)


def test_trailing_spacing_gives_the_steps_that_were_asked_for() -> None:
    """For 61 steps diffusers' arithmetic gives 62, the last of them -1."""
    for steps in range(1, 201):
        timesteps = spaced_timesteps(SD, steps, "trailing")
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0
        assert (np.diff(timesteps) < 0).all()


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        SD.alphas_cumprod[0] = 0.5


@given(st.floats(0.0292, 80))
def test_a_latent_consistency_timestep_has_its_sigma(sigma: float) -> None:
    (t,) = LATENT.timesteps_of(np.array([sigma]))
    below = int(t)
    logs = np.log(LATENT.sigmas[below : below + 2].astype(np.float64))
    assert logs[0] + (t - below) * (logs[1] - logs[0]) == pytest.approx(math.log(sigma), abs=1e-4)


def test_latent_consistency_time_points_are_the_searched_ones_or_karras() -> None:
    assert LATENT.sampling_sigmas(1).tolist() == [80.0]
    assert LATENT.sampling_sigmas(2).tolist() == [80.0, 1.5]
    roots = LATENT.sampling_sigmas(4) ** (1 / 7)
    assert roots[0] ** 7 == pytest.approx(80)
    assert np.diff(roots) == pytest.approx(np.full(3, (0.029167 ** (1 / 7) - 80 ** (1 / 7)) / 4))


@pytest.mark.parametrize(
    ("low", "high", "searched", "message"),
    [
        (0.002, 80.0, {}, r"sigma_min: 0.002 .*allowed: from 0.02916"),
        (0.03, 5000.0, {}, "sigma_max: 5000.0; allowed: .* to 4096"),
        (2.0, 1.0, {}, "sigma_min below sigma_max"),
        (0.03, 80.0, {2: (80.0,)}, "sigmas for 2 steps"),
        (0.03, 80.0, {2: (1.0, 1.0)}, "strictly decreasing"),
        (0.03, 80.0, {1: (81.0,)}, "from sigma_max = 80.0"),
        (0.03, 80.0, {1: (0.02,)}, "to sigma_min = 0.03"),
    ],
)
def test_latent_consistency_noise_is_that_of_the_schedule(
    low: float, high: float, searched: dict[int, tuple[float, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LatentConsistencySchedule.on(LATENT, low, high, searched)
