"""The noise schedule: scaled-linear betas rescaled to zero terminal SNR, v-prediction (Salimans & Ho 2022)."""

import torch

STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def alphas_cumprod(device: torch.device) -> torch.Tensor:
    """Cumulative alpha, float32 [1000], zero at the last step (Lin et al. 2023, algorithm 1)."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, STEPS, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return (root**2).float().to(device)


def trailing(steps: int) -> list[int]:
    """Timesteps of a sampler of `steps` steps, trailing spacing, noisiest first."""
    return [round(STEPS - i * STEPS / steps) - 1 for i in range(steps)]


def noised(latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Latents [B, …] at cumulative alpha [B]."""
    alpha = per_row(alpha)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def velocity(latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The v target of `noised`."""
    alpha = per_row(alpha)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents


def from_velocity(v: torch.Tensor, noisy: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(denoised, noise) of a v-prediction."""
    alpha = per_row(alpha)
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * v, alpha.sqrt() * v + (1 - alpha).sqrt() * noisy


def per_row(values: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]
