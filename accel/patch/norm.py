"""GroupNorm of one part's rows with the statistics of the whole picture, or what is known of them.

Parts are equally large, so with fresh mean m and variance v of this part i, and m_j, v_j those that part j gave,

    mean     = avg(m_j) + (m - m_i)
    moment   = avg(v_j + m_j²) + (v + m²) - (v_i + m_i²)            (Li et al. 2024, section 4)
    variance = moment - mean²,  or v where that is negative

In a synchronous call m_i = m and v_i = v, and this is GroupNorm of the whole picture. The paper's code scales the
variance by count / (count - 1); GroupNorm does not, and neither does this.
"""

from __future__ import annotations

import torch
from torch import nn

from accel.patch.exchange import Link


class PatchGroupNorm(nn.GroupNorm):
    """A GroupNorm with the parameters of `norm`, run on a part's rows while its link is connected."""

    def __init__(self, norm: nn.GroupNorm, link: Link, layer: int) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(norm.__dict__)  # the same parameters, not copies
        self.link, self._layer = link, layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[R, C, ...] -> the same, in the input's dtype; statistics are float32."""
        if self.link.parts == 1:
            return super().forward(input)
        grouped = input.unflatten(1, (self.num_groups, -1)).float()
        variance, mean = torch.var_mean(grouped, dim=tuple(range(2, grouped.ndim)), correction=0)  # [R, G] each
        mean, variance = self._whole(mean, variance)
        scale = torch.rsqrt(variance + self.eps)[:, :, None] * self.weight.float().view(self.num_groups, -1)
        shift = self.bias.float().view(self.num_groups, -1) - mean[:, :, None] * scale
        shape = (len(input), -1, *[1] * (input.ndim - 2))
        return torch.addcmul(shift.view(shape), input, scale.view(shape)).to(input.dtype)

    def _whole(self, mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the whole picture, [R, G] each, from this part's."""
        link = self.link
        if link.statistics == "separate":
            return mean, variance
        fresh = torch.stack([mean, variance], dim=1)
        every = link.swap(
            self._layer, fresh, own=link.statistics == "stale", waited=link.statistics == "synchronous"
        )  # [R, n, 2, G]
        # Means are counted from this part's fresh one, where the equations lose nothing to cancellation.
        means, variances = every[:, :, 0] - mean[:, None], every[:, :, 1]
        own_mean, own_variance = means[:, link.part], variances[:, link.part]
        offset = means.mean(dim=1) - own_mean
        moment = (variances + means.square()).mean(dim=1) + variance - own_variance - own_mean.square()
        whole = moment - offset.square()
        return mean + offset, torch.where(whole < 0, variance, whole)
