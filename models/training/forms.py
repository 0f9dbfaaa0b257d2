"""Consistency functions in terms of a UNet's velocity: f(x, t) = keep x - take v(scale x, t)."""

from typing import NamedTuple

import torch

from models.training.schedule import per_row

_LCM_SIGMA_DATA, _LCM_TIMESTEP_SCALING = 0.5, 10.0


class Form(NamedTuple):
    """The three factors of each row, all [B] float32."""

    scale: torch.Tensor
    keep: torch.Tensor
    take: torch.Tensor

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """What the UNet is shown of x [B, 4, h, h]."""
        return per_row(self.scale) * x

    def value(self, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """f, from the velocity at `seen(x)`."""
        return per_row(self.keep) * x - per_row(self.take) * v


def lcm_form(timestep: torch.Tensor, alpha: torch.Tensor) -> Form:
    """Of latent consistency models, on x_vp: c_skip x + c_out x0 (Luo et al. 2023, equation 9), as LCMScheduler has it.

    Args:
        timestep, alpha: [B], and the cumulative alpha there.
    """
    scaled = timestep * _LCM_TIMESTEP_SCALING
    power = scaled.square() + _LCM_SIGMA_DATA**2
    skip, out = _LCM_SIGMA_DATA**2 / power, scaled / power.sqrt()
    return Form(torch.ones_like(alpha), skip + out * alpha.sqrt(), out * (1 - alpha).sqrt())


def edm_form(sigma: torch.Tensor, low: float) -> Form:
    """Of consistency models, on x_ve: c_skip x + c_out F(c_in x) with F = -v (Song et al. 2023, appendix C).

    Latents have unit variance, so sigma_data is 1. Where sigma [B] is `low`, f(x) = x. With `low` 0 this is the
    denoiser of Karras et al. 2022, equation 7.
    """
    excess, norm = sigma - low, (sigma.square() + 1).sqrt()
    return Form(1 / norm, 1 / (excess.square() + 1), excess / norm)
