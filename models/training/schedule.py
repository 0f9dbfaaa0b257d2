"""The noise schedule: scaled-linear betas rescaled to zero terminal SNR, v-prediction (Salimans & Ho 2022).

Consistency models count noise in sigma, the ratio of noise to signal (Karras et al. 2022): x_ve = x0 + sigma z, and
x_vp = x_ve / sqrt(1 + sigma^2) is what the UNet sees.
"""

import torch

STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
SIGMA_MAX = 80.0
_RHO = 7.0


def alphas_cumprod(device: torch.device) -> torch.Tensor:
    """Cumulative alpha, float32 [1000], zero at the last step (Lin et al. 2023, algorithm 1)."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, STEPS, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return (root**2).float().to(device)


class NoiseLevels:
    """sigma of timestep and back; between two timesteps, timestep is linear in log sigma.

    low: sigma of timestep 0, where consistency functions are the identity. The last timestep has no signal and so no
    sigma; the one before has sigma above SIGMA_MAX.
    """

    def __init__(self, device: torch.device) -> None:
        alphas = alphas_cumprod(torch.device("cpu")).double()[:-1]
        logs = ((1 - alphas) / alphas).log() / 2
        self._logs = logs.float().to(device)
        self.low = float(logs[0].exp().float())

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Fractional timesteps [B] of sigma [B]."""
        logs = sigma.log()
        above = torch.searchsorted(self._logs, logs).clamp(1, len(self._logs) - 1)
        before = self._logs[above - 1]
        return (above - 1 + (logs - before) / (self._logs[above] - before)).clamp(0, len(self._logs) - 1)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """sigma [B] of fractional timesteps [B]."""
        below = timestep.long().clamp(0, len(self._logs) - 2)
        return self._logs[below].lerp(self._logs[below + 1], timestep - below).exp()


def karras(count: int, low: float) -> list[float]:
    """`count` sigmas from SIGMA_MAX down to `low`, both exact (Karras et al. 2022, equation 5)."""
    top, bottom = SIGMA_MAX ** (1 / _RHO), low ** (1 / _RHO)
    inner = [(top + i / (count - 1) * (bottom - top)) ** _RHO for i in range(1, count - 1)]
    return [SIGMA_MAX, *inner, low]


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
