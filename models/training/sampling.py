"""Sampling on the training machine: DDIM with guidance, and LCM; both as diffusers' schedulers do it."""

import itertools
import math

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from models.training.compiled import Compiled
from models.training.distributed import Ranks
from models.training.networks import LATENT_CHANNELS
from models.training.schedule import STEPS, alphas_cumprod, from_velocity, per_row, trailing

ORIGINAL_STEPS = 50
STRIDE = STEPS // ORIGINAL_STEPS
_SIGMA_DATA, _TIMESTEP_SCALING = 0.5, 10.0


class Velocity(nn.Module):
    """A frozen UNet's float32 velocity; one more argument [B, width] embeds the guidance of a student."""

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

    def __init__(self, function: Compiled, batch: int) -> None:
        self._function = function
        self._batch = batch

    @torch.no_grad()
    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        out = []
        for parts in zip(*(argument.split(self._batch) for argument in arguments), strict=True):
            count = len(parts[0])
            padding = self._batch - count if self._function.compiles else 0
            padded = [torch.cat([p, p[:1].expand(padding, *p.shape[1:])]).contiguous() for p in parts]
            out.append(self._function(*padded)[:count])
        return torch.cat(out)


def guidance_embedding(omega: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of 1000 * omega [B] -> [B, width], as LatentConsistencyModelPipeline embeds guidance - 1."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=omega.device) * -(math.log(10_000.0) / (half - 1)))
    angles = (omega.float() * 1000)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def boundary(timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(c_skip, c_out) of LCMScheduler, each [B, 1, 1, 1]."""
    scaled = timestep.float() * _TIMESTEP_SCALING
    power = scaled.square() + _SIGMA_DATA**2
    return per_row(_SIGMA_DATA**2 / power), per_row(scaled / power.sqrt())


def consistency(v: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The consistency function f = c_skip x + c_out x0 (Luo et al. 2023, equation 9)."""
    skip, out = boundary(timestep)
    return skip * noisy + out * from_velocity(v, noisy, alpha)[0]


def lcm_timesteps(steps: int) -> list[int]:
    """LCMScheduler's timesteps out of ORIGINAL_STEPS, noisiest first."""
    origin = [STRIDE * (ORIGINAL_STEPS - i) - 1 for i in range(ORIGINAL_STEPS)]
    return [origin[math.floor(i * ORIGINAL_STEPS / steps)] for i in range(steps)]


def start_noise(count: int, side: int, seed: int, ranks: Ranks) -> torch.Tensor:
    """Seeded noise [B, 4, side, side], drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
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
) -> torch.Tensor:
    """Latents [B, 4, side, side] by DDIM (Song et al. 2021, eta 0) with classifier-free guidance."""
    alphas = torch.cat([alphas_cumprod(ranks.device), torch.ones(1, device=ranks.device)])
    x = start_noise(len(states), side, seed, ranks)
    both = torch.cat([null.expand_as(states), states])
    times = [*trailing(steps), STEPS]  # index STEPS holds alpha 1: set_alpha_to_one
    for now, after in itertools.pairwise(times):
        timestep = torch.full((len(x),), now, device=ranks.device)
        without, with_text = predict(torch.cat([x, x]), torch.cat([timestep, timestep]), both).chunk(2)
        v = without + guidance * (with_text - without)
        denoised, noise = from_velocity(v, x, alphas[timestep])
        alpha = alphas[after]
        x = alpha.sqrt() * denoised + (1 - alpha).sqrt() * noise
    return x


@torch.no_grad()
def sample_lcm(
    predict: FixedBatch,
    states: torch.Tensor,
    side: int,
    ranks: Ranks,
    *,
    guidance: float,
    guidance_width: int,
    seed: int,
    steps: int,
) -> torch.Tensor:
    """Latents [B, 4, side, side] by multistep consistency sampling (Luo et al. 2023, algorithm 3)."""
    alphas = alphas_cumprod(ranks.device)
    x = start_noise(len(states), side, seed, ranks)
    omega = torch.full((len(x),), guidance - 1, device=ranks.device)
    embedding = guidance_embedding(omega, guidance_width).to(ranks.dtype)
    times = lcm_timesteps(steps)
    for index, now in enumerate(times):
        timestep = torch.full((len(x),), now, device=ranks.device)
        x = consistency(predict(x, timestep, states, embedding), x, timestep, alphas[timestep])
        if index + 1 < steps:
            alpha = alphas[times[index + 1]]
            noise = start_noise(len(x), side, seed + 7919 * (index + 1), ranks)
            x = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
    return x
