"""Latent consistency lessons against the stock schedulers, and the training in miniature."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from models.training.checkpoints import Checkpoints
from models.training.lcm import Lessons, train_lcm, train_lcm_lora
from models.training.sampling import predictor
from models.training.schedule import alphas_cumprod
from tests.models.training.small import CPU, PRESET, FakeRing, null, ranks, taught, teacher, weights

BATCH = 64


def test_targets_are_one_guided_ddim_step_and_the_averaged_student() -> None:
    """Luo et al. 2023, algorithm 1; the step is DDIMScheduler's, the boundary conditions are LCMScheduler's."""
    guide, average = (predictor(teacher(seed).requires_grad_(False), "inference", BATCH, ranks()) for seed in (1, 2))
    torch.manual_seed(0)
    lessons = Lessons(PRESET, FakeRing(), BATCH, null(), guide, average, ranks(), scale=2.5)
    noisy, timestep, states, target, weight, scale, keep, take = lessons.draw(0.0)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True,
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(50)
    alphas = alphas_cumprod(CPU)
    without, with_text = guide(noisy, timestep, null().expand_as(states)), guide(noisy, timestep, states)
    v = without + 2.5 * (with_text - without)
    for row, now in enumerate(timestep.long()):
        nearer = scheduler.step(v[row : row + 1], now, noisy[row : row + 1], return_dict=False)[0]
        after = max(int(now) - 20, 0)
        alpha, scaled = alphas[after], 10.0 * after
        student = average(nearer, torch.tensor([float(after)]), states[row : row + 1])
        x0 = alpha.sqrt() * nearer - (1 - alpha).sqrt() * student
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        torch.testing.assert_close(target[row : row + 1], c_skip * nearer + c_out * x0, rtol=1e-3, atol=1e-3)
    assert torch.equal(weight, torch.ones(BATCH))
    assert torch.equal(scale, torch.ones(BATCH))
    torch.testing.assert_close(keep, alphas[timestep.long()].sqrt(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(take, (1 - alphas[timestep.long()]).sqrt(), rtol=1e-3, atol=1e-3)
    assert set(timestep.long().tolist()) <= set(range(19, 1000, 20))


def test_a_student_that_reads_guidance_gets_its_embedding() -> None:
    average = predictor(teacher(2).requires_grad_(False), "inference", BATCH, ranks())
    seen: list[tuple[torch.Tensor, ...]] = []

    def target(*arguments: torch.Tensor) -> torch.Tensor:
        seen.append(arguments)
        return average(*arguments[:3])

    lessons = Lessons(PRESET, FakeRing(), BATCH, null(), average, target, ranks())  # type: ignore[arg-type]
    example = lessons.draw(0.0)
    assert example[-1].shape == (BATCH, PRESET.guidance_width)
    assert torch.equal(seen[0][3], example[-1])
    assert len(example[-1].unique(dim=0)) == BATCH


def run(train: Any, folder: Path, seconds: float, **rings: FakeRing) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    there = ranks()
    preset = replace(PRESET, large_every=5)
    figures = train(preset, FakeRing(), null(), weights(teacher()), there, Checkpoints(folder, there), seconds, **rings)
    done = Checkpoints(folder, there).finished(train.__name__.removeprefix("train_").replace("_", "-"))
    assert done is not None
    return figures, done["weights"]


def test_the_lcm_learns_from_both_sizes(tmp_path: Path) -> None:
    large = FakeRing(side=2 * PRESET.latent)
    figures, student = run(train_lcm, tmp_path, 2, large=large)
    assert figures["steps"] >= 20
    assert large.refills >= figures["steps"] // 5 // PRESET.refill_every
    assert set(student) - set(weights(teacher())) == {"time_embedding.cond_proj.weight"}
    assert float(student["time_embedding.cond_proj.weight"].abs().max()) > 1e-4  # it started at 0


def test_the_lcm_lora_ends_in_a_lora(tmp_path: Path) -> None:
    figures, lora = run(train_lcm_lora, tmp_path, 2)
    assert figures["steps"] >= 20
    assert {value.dtype for value in lora.values()} == {torch.float32}
    assert {value.shape[0] for key, value in lora.items() if "lora_A" in key} == {PRESET.lora_rank}
    assert taught(lora)
