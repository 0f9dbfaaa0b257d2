"""LoRA of a frozen UNet (Hu et al. 2021): every linear layer and convolution computes with W + up down.

The product is merged into the weight at each call, one small matrix product a layer, so that activations pass through
the layer once and the network runs at the speed of the plain one.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

_PREFIX = "unet."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


class AdaptedLinear(nn.Module):
    """A frozen linear layer with its adapter. The layer's own tensors are buffers, so the parameters are the adapter's.

    base: [out, in]. down: [rank, in]. up: [out, rank], zero at first.
    """

    base: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rank: int) -> None:
        super().__init__()
        out, fan_in = weight.shape
        self.register_buffer("base", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.down = nn.Parameter(torch.randn(rank, fan_in).to(weight) / math.sqrt(fan_in))
        self.up = nn.Parameter(weight.new_zeros(out, rank))

    def merged(self) -> torch.Tensor:
        """W + up down; the sum is rounded once to the layer's precision."""
        return torch.addmm(self.base, self.up, self.down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.merged(), self.bias)

    def pair(self, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(down, up) in the shapes of a LoRA file."""
        return down, up


class AdaptedConv2d(AdaptedLinear):
    """A frozen convolution with its adapter. `in` is [kernel, kernel, in] here: the merged weight is channels-last."""

    def __init__(self, layer: nn.Conv2d, rank: int) -> None:
        super().__init__(layer.weight.permute(0, 2, 3, 1).flatten(1), layer.bias, rank)
        self.kernel, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding

    def _unfold(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, kernel * kernel * in] -> [R, in, kernel, kernel]."""
        return rows.view(len(rows), *self.kernel, -1).permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self._unfold(self.merged()), self.bias, self.stride, self.padding)

    def pair(self, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._unfold(down), up[:, :, None, None]


class Adapters(nn.Module):
    """All adapters of a UNet. Its parameters are theirs alone: (down, up) of each layer in turn."""

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        """Puts an adapted layer in the place of every linear layer and convolution of `unet`."""
        super().__init__()
        self.names: list[str] = []
        layers: list[AdaptedLinear] = []
        for name, layer in list(unet.named_modules()):
            if isinstance(layer, nn.Conv2d):
                layers.append(AdaptedConv2d(layer, rank))
            elif isinstance(layer, nn.Linear):
                layers.append(AdaptedLinear(layer.weight, layer.bias, rank))
            else:
                continue
            self.names.append(name)
            unet.set_submodule(name, layers[-1])
        self.layers = nn.ModuleList(layers)

    def weights(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A LoRA's weights under diffusers' names, from values in the order and shapes of the parameters."""
        out = {}
        for name, layer, down, up in zip(self.names, self.layers, values[::2], values[1::2], strict=True):
            assert isinstance(layer, AdaptedLinear)
            out[f"{_PREFIX}{name}{_DOWN}"], out[f"{_PREFIX}{name}{_UP}"] = layer.pair(down, up)
        return out


def merge(teacher: dict[str, torch.Tensor], lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The teacher's weights with a LoRA of `Adapters.weights` in them, for a plain UNet."""
    out = dict(teacher)
    for key, down in lora.items():
        if key.endswith(_DOWN):
            name = key.removeprefix(_PREFIX).removesuffix(_DOWN)
            product = lora[f"{_PREFIX}{name}{_UP}"].flatten(1) @ down.flatten(1)
            weight = teacher[f"{name}.weight"]
            out[f"{name}.weight"] = weight + product.view(weight.shape).to(weight)
    return out


def save_lora(lora: dict[str, torch.Tensor], path: Path) -> None:
    """Write a LoRA in diffusers' format, in float16; without alphas, so its scale is 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().cpu().contiguous() for key, value in lora.items()}, path)
