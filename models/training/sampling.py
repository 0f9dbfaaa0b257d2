"""Sampling on the training machine: DDIM with guidance, LCM and consistency models; all as they are served."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from models.training.compiled import Compiled
from models.training.distributed import Ranks
from models.training.forms import Form, edm_form, lcm_form
from models.training.networks import LATENT_CHANNELS
from models.training.schedule import STEPS, NoiseLevels, alphas_cumprod, from_velocity, per_row, trailing

ORIGINAL_STEPS = 50
STRIDE = STEPS // ORIGINAL_STEPS


class Velocity(nn.Module):
    """A UNet's float32 velocity; one more argument [B, width] embeds the guidance of a student.

    Timesteps [B] are float32 wherever velocities are asked for, so that all samplers share one compiled graph.
    """

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = dtype

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor, guidance: torch.Tensor | None = None
    ) -> torch.Tensor:
        noisy = noisy.to(self.dtype).contiguous(memory_format=torch.channels_last)
        output: torch.Tensor = self.unet(noisy, timestep, states, timestep_cond=guidance, return_dict=False)[0].float()
        return output


class FixedBatch:
    """Calls a compiled function in chunks of one size, the last padded, so that one graph serves any batch.

    A function that is not compiled gets the last chunk as it is.
    """

    def __init__(self, function: Callable[..., torch.Tensor], batch: int) -> None:
        self._function = function
        self._batch = batch
        self._pads = isinstance(function, Compiled) and function.compiles

    @torch.no_grad()
    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        out = []
        for parts in zip(*(argument.split(self._batch) for argument in arguments), strict=True):
            count = len(parts[0])
            padding = self._batch - count if self._pads else 0
            padded = [torch.cat([p, p[:1].expand(padding, *p.shape[1:])]).contiguous() for p in parts]
            out.append(self._function(*padded)[:count])
        return torch.cat(out)


def predictor(unet: UNet2DConditionModel, name: str, batch: int, ranks: Ranks) -> FixedBatch:
    """The UNet's velocity without gradients, compiled for `batch` rows as `name`."""
    return FixedBatch(Compiled(Velocity(unet, ranks.dtype), name, ranks), batch)


def guided(
    predict: FixedBatch,
    noisy: torch.Tensor,
    timestep: torch.Tensor,
    states: torch.Tensor,
    null: torch.Tensor,
    omega: torch.Tensor,
) -> torch.Tensor:
    """Velocity [B, 4, h, h] with classifier-free guidance of scale 1 + omega [B] (Ho & Salimans 2022, equation 6).

    `null`: text states [1, LENGTH, width] of the empty prompt. Asks `predict` for 2 B rows at once.
    """
    both = torch.cat([null.expand_as(states), states])
    without, with_text = predict(torch.cat([noisy, noisy]), torch.cat([timestep, timestep]), both).chunk(2)
    return with_text + per_row(omega) * (with_text - without)


def consistent(
    predict: FixedBatch,
    form: Form,
    x: torch.Tensor,
    timestep: torch.Tensor,
    states: torch.Tensor,
    *guidance: torch.Tensor,
) -> torch.Tensor:
    """The consistency function f(x, t) [B, 4, h, h]; `guidance`: the embedding, of students that take one."""
    return form.value(predict(form.seen(x), timestep, states, *guidance), x)


def guidance_embedding(omega: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of 1000 * omega [B] -> [B, width], as LatentConsistencyModelPipeline embeds guidance - 1."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=omega.device) * -(math.log(10_000.0) / (half - 1)))
    angles = (omega.float() * 1000)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def lcm_timesteps(steps: int) -> list[int]:
    """LCMScheduler's timesteps out of ORIGINAL_STEPS, noisiest first."""
    origin = [STRIDE * (ORIGINAL_STEPS - i) - 1 for i in range(ORIGINAL_STEPS)]
    return [origin[math.floor(i * ORIGINAL_STEPS / steps)] for i in range(steps)]


def start_noise(count: int, side: int, seed: int, ranks: Ranks, row: int = 0) -> torch.Tensor:
    """Seeded noise [B, 4, side, side] of a sampler's row, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed + 7919 * row)
    return torch.randn(count, LATENT_CHANNELS, side, side, generator=generator).to(ranks.device)


@torch.no_grad()
def sample_ddim(
    predict: FixedBatch,
    states: torch.Tensor,
    null: torch.Tensor,
    side: int,
    ranks: Ranks,
    *,
    guidance: float,
    seed: int,
    steps: int = 50,
    start: torch.Tensor | None = None,
    first: int = 0,
    stop: int | None = None,
) -> torch.Tensor:
    """Latents [B, 4, side, side] by DDIM (Song et al. 2021, eta 0) with classifier-free guidance.

    Args:
        start: latents on their way as row `first` takes them, in place of noise.
        first, stop: the rows to run, of `steps`: what stops at row K can be the start of another run at row K.
    """
    alphas = torch.cat([alphas_cumprod(ranks.device), torch.ones(1, device=ranks.device)])
    x = start_noise(len(states), side, seed, ranks) if start is None else start
    omega = torch.full((len(x),), guidance - 1, device=ranks.device)
    pairs = itertools.pairwise([*trailing(steps), STEPS])  # index STEPS holds alpha 1: set_alpha_to_one
    for now, after in itertools.islice(pairs, first, stop):
        timestep = torch.full((len(x),), float(now), device=ranks.device)
        v = guided(predict, x, timestep, states, null, omega)
        denoised, noise = from_velocity(v, x, alphas[now].expand(len(x)))
        x = alphas[after].sqrt() * denoised + (1 - alphas[after]).sqrt() * noise
    return x


@torch.no_grad()
def sample_lcm(
    predict: FixedBatch,
    states: torch.Tensor,
    side: int,
    ranks: Ranks,
    *,
    guidance: float | None,
    guidance_width: int,
    seed: int,
    steps: int,
) -> torch.Tensor:
    """Latents [B, 4, side, side] by multistep consistency sampling (Luo et al. 2023, algorithm 3).

    `guidance` None: the student has its guidance distilled in, as an LCM-LoRA has, and takes no embedding.
    """
    alphas = alphas_cumprod(ranks.device)
    x = start_noise(len(states), side, seed, ranks)
    embedding: tuple[torch.Tensor, ...] = ()
    if guidance is not None:
        omega = torch.full((len(x),), guidance - 1, device=ranks.device)
        embedding = (guidance_embedding(omega, guidance_width).to(ranks.dtype),)
    for row, now in enumerate(lcm_timesteps(steps)):
        alpha = alphas[now].expand(len(x))
        if row:
            x = per_row(alpha).sqrt() * x + per_row(1 - alpha).sqrt() * start_noise(len(x), side, seed, ranks, row)
        timestep = torch.full((len(x),), float(now), device=ranks.device)
        x = consistent(predict, lcm_form(timestep, alpha), x, timestep, states, *embedding)
    return x


@torch.no_grad()
def sample_consistency(
    predict: FixedBatch, states: torch.Tensor, side: int, ranks: Ranks, *, sigmas: Sequence[float], seed: int
) -> torch.Tensor:
    """Latents [B, 4, side, side] by multistep consistency sampling (Song et al. 2023, algorithm 1).

    `sigmas`: the time points, one a step, falling from SIGMA_MAX.
    """
    levels = NoiseLevels(ranks.device)
    x = torch.zeros(len(states), LATENT_CHANNELS, side, side, device=ranks.device)
    for row, sigma in enumerate(sigmas):
        scale = sigma if row == 0 else math.sqrt(sigma**2 - levels.low**2)
        x = x + scale * start_noise(len(x), side, seed, ranks, row)
        rows = torch.full((len(x),), sigma, device=ranks.device)
        x = consistent(predict, edm_form(rows, levels.low), x, levels.timestep(rows), states)
    return x
