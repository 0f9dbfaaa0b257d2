"""The patch plan of a UNet: which pictures can be shared out among ranks, and which of its modules take part.

Most modules of a UNet look at one pixel or one token and run on a part's rows as they are. Convolutions larger than
1x1, GroupNorm and attention do not: `install` puts their twins of accel/patch in their places, which hold the same
parameters and run as before while no picture is shared out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accel.patch.attention import PatchCrossAttention, PatchSelfAttention
from accel.patch.conv import PatchConv2d, PatchInputConv2d
from accel.patch.exchange import Link
from accel.patch.norm import PatchGroupNorm
from models.diffusion.denoiser import TextDenoiser
from models.errors import PatchError

BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
# What diffusers' UNets can have besides, and the only values with which every other module looks at one pixel or token.
PLAIN = {
    "downsample_padding": 1,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "cross_attention_norm": None,
    "attention_type": "default",
    "encoder_hid_dim_type": None,
    "class_embed_type": None,
}


@dataclass(frozen=True, slots=True)
class PatchPlan:
    """Which degrees a model can be run at. Rows are latent rows.

    halvings: how often the UNet halves its rows, 2 ** halvings being what a part's rows must be a multiple of.
    """

    halvings: int

    def parts(self, degree: int, *, guided: bool) -> int:
        """Into how many parts a picture's rows are shared out: guidance branches are split first."""
        return degree // 2 if guided and degree % 2 == 0 else degree

    def row_multiple(self, degree: int, *, guided: bool) -> int:
        """Pictures of a multiple of so many rows can be drawn by so many ranks."""
        parts = self.parts(degree, guided=guided)
        return parts << self.halvings if parts > 1 else 1

    def degrees(self, rows: int, most: int, *, guided: bool) -> tuple[int, ...]:
        """All degrees up to `most` that pictures of so many rows can be drawn at."""
        return tuple(degree for degree in range(1, most + 1) if rows % self.row_multiple(degree, guided=guided) == 0)

    def check(self, degree: int, rows: int, *, guided: bool) -> None:
        """Raise PatchError where pictures of so many rows cannot be drawn at this degree."""
        if degree < 1:
            raise PatchError(f"patch_degree {degree} is not allowed; allowed: at least 1")
        multiple = self.row_multiple(degree, guided=guided)
        if rows % multiple:
            degrees = ", ".join(map(str, self.degrees(rows, degree, guided=guided)))
            raise PatchError(
                f"patch_degree {degree} needs latent rows in multiples of {multiple}, and this picture has {rows}; "
                f"with {rows} rows patch_degree {degrees} would work"
            )


def patch_plan(denoiser: object) -> PatchPlan:
    """The plan of a denoiser's network.

    Raises:
        PatchError: there is none, because of what it names.
    """
    if not isinstance(denoiser, TextDenoiser):
        raise PatchError(f"a {type(denoiser).__name__} has no patch plan; patch_degree 1 would work")
    config = denoiser.network.config
    for key, wanted in PLAIN.items():
        if config.get(key, wanted) != wanted:
            raise _no_plan(f"{key} {config[key]!r}")
    for block in (*config.down_block_types, *config.up_block_types):
        if block not in BLOCKS:
            raise _no_plan(block)
    if config.mid_block_type not in MIDDLES:
        raise _no_plan(config.mid_block_type)
    return PatchPlan(len(config.block_out_channels) - 1)


def install(network: nn.Module, device: torch.device, *, entry: str | None = None) -> Link:
    """Put patch modules in the places of a network's own, once, and return what ties them to an exchange.

    LoRA layers must have been loaded before: theirs take part as well.

    Args:
        entry: the module that is given whole pictures and takes its part of them.

    Raises:
        PatchError: a module has no twin; nothing has been changed.
    """
    for module in network.modules():
        if isinstance(module, PatchGroupNorm):
            return module.link
    places = list(_places(network))
    link = Link(device)
    twins: dict[int, nn.Module] = {}  # some modules stand in two places
    crossing = 0
    for layer, (path, parent, name, module) in enumerate(places):
        if isinstance(module, nn.GroupNorm):
            twins.setdefault(id(module), PatchGroupNorm(module, link, layer))
        elif isinstance(module, nn.Conv2d):
            entered = entry is not None and f"{path}.".startswith(f"{entry}.")
            twins.setdefault(id(module), (PatchInputConv2d if entered else PatchConv2d)(module, link, layer))
        elif module.is_cross_attention:
            module.set_processor(PatchCrossAttention(link, crossing, module.processor))
            crossing += 1
            continue
        else:
            module.set_processor(PatchSelfAttention(link, layer, module.processor))
            continue
        parent.add_module(name, twins[id(module)])
    return link


def cross_attentions(network: nn.Module) -> list[Any]:
    """The cross-attention layers of a network in the order of its link's `text`."""
    found = [
        module for module in network.modules() if isinstance(getattr(module, "processor", None), PatchCrossAttention)
    ]
    return sorted(found, key=lambda module: module.processor.index)


def _places(network: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """(path, parent, name, module) of every module that looks beyond a pixel."""
    from diffusers.models.attention_processor import Attention

    for path, parent in network.named_modules():
        for name, module in parent._modules.items():
            full = f"{path}.{name}" if path else name
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
                if reason := PatchConv2d.refusal(module):
                    raise _no_plan(f"{reason} at {full}")
                yield full, parent, name, module
            elif isinstance(module, nn.GroupNorm):
                yield full, parent, name, module
            elif isinstance(module, Attention):
                if module.spatial_norm is not None or module.norm_q is not None or module.norm_cross is not None:
                    raise _no_plan(f"normalised attention at {full}")
                yield full, parent, name, module


def _no_plan(what: str) -> PatchError:
    return PatchError(f"a network with {what} has no patch plan; patch_degree 1 would work")
