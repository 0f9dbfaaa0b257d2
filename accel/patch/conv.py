"""Convolution of one part's rows: the rows beyond its edges come from its neighbours.

With kernel k, stride s and padding p, and a part of h rows (a multiple of s), the part's outputs read p rows above it
and k - s - p rows below it. Width is not shared out, so its padding stays the convolution's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from accel.patch.exchange import Link


class PatchConv2d(nn.Conv2d):
    """A convolution with the parameters of `conv`, run on a part's rows while its link is connected."""

    def __init__(self, conv: nn.Conv2d, link: Link, layer: int) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)  # the same parameters, not copies
        self.link, self._layer = link, layer
        (kernel, _), (stride, _), self._sides = conv.kernel_size, conv.stride, (0, int(conv.padding[1]))
        self._above = int(conv.padding[0])
        self._below = kernel - stride - self._above

    @staticmethod
    def refusal(conv: nn.Conv2d) -> str | None:
        """Why a convolution cannot be run in parts; None: it can."""
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or set(conv.dilation) != {1}:
            return f"a convolution with padding {conv.padding} ({conv.padding_mode}) and dilation {conv.dilation}"
        if not 0 <= conv.kernel_size[0] - conv.stride[0] - conv.padding[0] <= conv.kernel_size[0]:
            return f"a convolution of kernel {conv.kernel_size}, stride {conv.stride} and padding {conv.padding}"
        return None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[R, C, h, w] -> [R, C', h / s, w'], of this part; all rows while the link is not connected."""
        if self.link.parts == 1:
            return super().forward(input)
        return F.conv2d(self._with_halo(input), self.weight, self.bias, self.stride, self._sides, 1, self.groups)

    def _with_halo(self, x: torch.Tensor) -> torch.Tensor:
        above, below, part = self._above, self._below, self.link.part
        # What the part above reads of this one, then what the part below does. [R, rows, w, C]: as channels-last lies.
        edges = torch.cat([x[:, :, :below], x[:, :, x.shape[2] - above :]], dim=2).permute(0, 2, 3, 1).contiguous()
        every = self.link.swap(self._layer, edges)
        pieces = [x]
        if above:
            top = torch.zeros_like(edges[:, below:]) if part == 0 else every[:, part - 1, below:]
            pieces.insert(0, top.permute(0, 3, 1, 2))
        if below:
            last = part == self.link.parts - 1
            bottom = torch.zeros_like(edges[:, :below]) if last else every[:, part + 1, :below]
            pieces.append(bottom.permute(0, 3, 1, 2))
        return torch.cat(pieces, dim=2)


class PatchInputConv2d(PatchConv2d):
    """The convolution at a network's entry: it is given the whole picture and takes its part of it, edges included."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[R, C, H, w] -> [R, C', h, w'] of this part."""
        parts, part = self.link.parts, self.link.part
        if parts == 1:
            return super().forward(input)
        height = input.shape[2]
        first, end = part * height // parts - self._above, (part + 1) * height // parts + self._below
        x = F.pad(input[:, :, max(first, 0) : min(end, height)], (0, 0, max(-first, 0), max(end - height, 0)))
        return F.conv2d(x, self.weight, self.bias, self.stride, self._sides, 1, self.groups)
