"""The same pictures as diffusers' own pipelines, from the same folders and the same initial noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel.samplers.library import build_plan
from models.diffusion.folder import quiet_libraries
from models.diffusion.loaded import LoadedModel
from models.diffusion.loading import load_model
from models.diffusion.model import Condition
from tests import tiny

PROMPTS = ["a red apple on a blue background", "two tiny foxes"]
NEGATIVES = ["green", ""]
LEAST_PSNR = 40.0


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


def load(folder: Path) -> LoadedModel:
    return load_model(str(folder), dtype="float32", device="cpu", cache_dir=folder / "cache")


def stock(folder: Path, name: str, scheduler: str | None = None) -> Any:
    import diffusers

    pipeline = getattr(diffusers, name).from_pretrained(folder)
    if scheduler is not None:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_for(model: LoadedModel, rows: int) -> torch.Tensor:
    width, height = model.card.default_size
    shape = (rows, model.card.latent_channels, height // model.card.scale, width // model.card.scale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def draw(
    model: LoadedModel, sampler: str, steps: int, conditions: list[Condition], noise: torch.Tensor, seed: int = 0
) -> np.ndarray:
    """What the engine does, for one batch with one plan, under the LoRA set in use."""
    return model.decode(denoise(model, sampler, steps, conditions, noise, seed)).numpy()


def denoise(
    model: LoadedModel, sampler: str, steps: int, conditions: list[Condition], noise: torch.Tensor, seed: int = 0
) -> torch.Tensor:
    """The same up to the latents."""
    loras = model.loras.active
    defaults, schedule = model.card.defaults(sampler, loras), model.schedule(sampler, loras)
    plan = build_plan(sampler, schedule, steps, spacing=defaults.spacing, karras=defaults.karras, eta=0.0)
    generator = torch.Generator().manual_seed(seed)
    x, previous = noise * plan.init_scale, torch.zeros_like(noise)
    for row in plan.rows:
        t, alpha = torch.full((len(x),), row.t), torch.full((len(x),), row.alpha)
        denoised = model.denoiser(sampler, loras)(x, t, alpha, conditions)
        x = row.a * x + row.b * denoised + row.c * previous
        if row.s:
            x = x + row.s * torch.randn(x.shape, generator=generator)
        previous = denoised
    return x


def psnr(pictures: np.ndarray, expected: np.ndarray) -> float:
    """Decibels between uint8 pictures and float ones in [0, 1]."""
    error = np.mean((pictures.astype(np.float64) - (expected * 255).round()) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.mark.parametrize(
    ("build", "sampler", "scheduler"),
    [
        (tiny.sd, "ddim", "DDIMScheduler"),
        (tiny.sd, "dpmpp_2m", "DPMSolverMultistepScheduler"),
        (tiny.sd2, "ddim", "DDIMScheduler"),
        (tiny.sd2, "euler", "EulerDiscreteScheduler"),
        (tiny.bundle, "ddim", "DDIMScheduler"),
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_stable_diffusion(
    tmp_path: Path, build: Callable[[Path], Path], sampler: str, scheduler: str, guidance: float
) -> None:
    folder = build(tmp_path / "model")
    model = load(folder)
    noise = noise_for(model, 2)
    pipeline = stock(folder, "StableDiffusionPipeline", scheduler)
    if model.card.samplers[sampler].karras:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    expected = pipeline(
        PROMPTS,
        negative_prompt=NEGATIVES,
        guidance_scale=guidance,
        num_inference_steps=5,
        latents=noise.clone(),
        output_type="np",
    ).images
    conditions = model.encode(
        list(zip(PROMPTS, NEGATIVES, strict=True)), [guidance, guidance], sampler, model.card.default_size
    )
    assert psnr(draw(model, sampler, 5, conditions, noise), expected) >= LEAST_PSNR


@pytest.mark.parametrize("negative", ["green", None])
def test_sdxl(tmp_path: Path, negative: str | None) -> None:
    folder = tiny.sdxl(tmp_path / "model")
    model = load(folder)
    noise = noise_for(model, 2)
    expected = stock(folder, "StableDiffusionXLPipeline")(
        PROMPTS,
        negative_prompt=None if negative is None else [negative, negative],
        guidance_scale=5.0,
        num_inference_steps=4,
        latents=noise.clone(),
        output_type="np",
    ).images
    pairs = [(prompt, negative or "") for prompt in PROMPTS]
    conditions = model.encode(pairs, [5.0, 5.0], "euler", model.card.default_size)
    assert psnr(draw(model, "euler", 4, conditions, noise), expected) >= LEAST_PSNR


def test_lcm(tmp_path: Path) -> None:
    folder = tiny.lcm(tmp_path / "model")
    model = load(folder)
    noise = noise_for(model, 2)
    expected = stock(folder, "LatentConsistencyModelPipeline")(
        PROMPTS,
        guidance_scale=6.5,
        num_inference_steps=4,
        latents=noise.clone(),
        generator=torch.Generator().manual_seed(9),
        output_type="np",
    ).images
    conditions = model.encode([(prompt, "") for prompt in PROMPTS], [6.5, 6.5], "lcm", model.card.default_size)
    assert all(condition.negative is None for condition in conditions)
    assert psnr(draw(model, "lcm", 4, conditions, noise, seed=9), expected) >= LEAST_PSNR


@pytest.mark.parametrize("classes", [None, 10])
@pytest.mark.parametrize("steps", [1, 3])
def test_consistency(tmp_path: Path, classes: int | None, steps: int) -> None:
    folder = tiny.consistency(tmp_path / "model", num_classes=classes)
    model = load(folder)
    noise = noise_for(model, 2)
    labels = None if classes is None else [7, 2]
    expected = stock(folder, "ConsistencyModelPipeline")(
        batch_size=2,
        class_labels=labels,
        num_inference_steps=steps,
        latents=noise.clone(),
        generator=torch.Generator().manual_seed(9),
        output_type="np",
    ).images
    conditions = [Condition(None, None, 1.0, class_label=label) for label in labels or [None, None]]
    assert psnr(draw(model, "consistency", steps, conditions, noise, seed=9), expected) >= LEAST_PSNR
