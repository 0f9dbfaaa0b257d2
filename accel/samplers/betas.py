"""The variances that the forward process adds at each training timestep, in float32 as networks are trained."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def betas_of(beta_schedule: str, start: float, end: float, total: int) -> torch.Tensor:
    """[total] float32 betas of one of BETA_SCHEDULES."""
    if beta_schedule == "linear":
        return torch.linspace(start, end, total, dtype=torch.float32)
    if beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32) ** 2
    # Nichol & Dhariwal 2021, equation 17, betas capped at 0.999.
    signal = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(signal)], dtype=torch.float32)


def rescale_zero_snr_betas(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alphas_cumprod) to end at 0 and to start where it did. Lin et al. 2023, algorithm 1."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    alphas_cumprod = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
