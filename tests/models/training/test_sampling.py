"""Samplers against the stock schedulers, and against themselves in parts."""

import itertools

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, LCMScheduler

from models.training.sampling import (
    FixedBatch,
    guidance_embedding,
    lcm_timesteps,
    predictor,
    sample_consistency,
    sample_ddim,
    sample_lcm,
    start_noise,
)
from models.training.schedule import SIGMA_MAX, NoiseLevels, karras
from models.training.timepoints import STEPS
from tests.models.training.small import CPU, FakeRing, null, ranks, teacher

RANKS = ranks()
LEVELS = NoiseLevels(CPU)
STATES = FakeRing(examples=3).states
SIDE = 4


@pytest.fixture(scope="module")
def predict() -> FixedBatch:
    return predictor(teacher().requires_grad_(False), "teacher inference", 6, RANKS)


def ddim(predict: FixedBatch, **options: object) -> torch.Tensor:
    return sample_ddim(predict, STATES, null(), SIDE, RANKS, guidance=3.0, seed=5, steps=10, **options)


def test_ddim_is_the_schedulers(predict: FixedBatch) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True,
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    x = start_noise(3, SIDE, 5, RANKS)
    for now in scheduler.timesteps:
        t = now.float().repeat(3)
        without, with_text = predict(x, t, null().expand_as(STATES)), predict(x, t, STATES)
        x = scheduler.step(without + 3.0 * (with_text - without), now, x, return_dict=False)[0]
    assert float((ddim(predict) - x).norm() / x.norm()) < 1e-3


@pytest.mark.parametrize("row", [0, 1, 6, 10])
def test_ddim_in_two_parts_is_ddim(predict: FixedBatch, row: int) -> None:
    half = ddim(predict, stop=row)
    torch.testing.assert_close(ddim(predict, start=half, first=row), ddim(predict), rtol=0, atol=0)


def test_lcm_is_the_schedulers(predict: FixedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True,
        prediction_type="v_prediction", clip_sample=False,
    )  # fmt: skip
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == lcm_timesteps(4)
    noises = (start_noise(3, SIDE, 5, RANKS, row) for row in itertools.count())
    x = next(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(noises))
    for now in scheduler.timesteps:
        x = scheduler.step(predict(x, now.float().repeat(3), STATES), now, x, return_dict=False)[0]
    ours = sample_lcm(predict, STATES, SIDE, RANKS, guidance=None, guidance_width=32, seed=5, steps=4)
    assert float((ours - x).norm() / x.norm()) < 1e-3


def test_consistency_is_the_schedulers(predict: FixedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multistep sampling as diffusers has it, its network being -v at c_in x."""
    sigmas = karras(40, LEVELS.low)
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=LEVELS.low, sigma_max=SIGMA_MAX, sigma_data=1.0, clip_denoised=False
    )
    scheduler.set_timesteps(timesteps=[32, 19, 0])
    ours = sample_consistency(predict, STATES, SIDE, RANKS, sigmas=[sigmas[0], sigmas[19], sigmas[32]], seed=5)
    noises = (start_noise(3, SIDE, 5, RANKS, row) for row in itertools.count())
    x = SIGMA_MAX * next(noises)
    path = "diffusers.schedulers.scheduling_consistency_models.randn_tensor"
    monkeypatch.setattr(path, lambda *_, **__: next(noises))
    for now, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        seen = scheduler.scale_model_input(x, now)
        v = predict(seen, LEVELS.timestep(sigma.repeat(3).float()), STATES)
        x = scheduler.step(-v, now, x, return_dict=False)[0]
    assert float((ours - x).norm() / x.norm()) < 1e-3


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize("steps", STEPS)
def test_few_steps_at_any_side_are_finite_and_seeded(predict: FixedBatch, steps: int, side: int) -> None:
    def draw(seed: int) -> torch.Tensor:
        sigmas = karras(steps + 1, LEVELS.low)[:-1]
        return torch.stack(
            [
                sample_lcm(predict, STATES, side, RANKS, guidance=None, guidance_width=32, seed=seed, steps=steps),
                sample_consistency(predict, STATES, side, RANKS, sigmas=sigmas, seed=seed),
            ]
        )

    first = draw(1)
    assert first.shape == (2, 3, 4, side, side)
    assert first.isfinite().all()
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))


def test_guidance_embedding_is_the_pipelines() -> None:
    from diffusers import LatentConsistencyModelPipeline

    omega = torch.tensor([0.0, 1.5, 6.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, omega, 32)  # type: ignore[arg-type]
    torch.testing.assert_close(guidance_embedding(omega, 32), theirs)
