"""The bundle's networks as stock diffusers modules."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from models.training.settings import Preset

LATENT_CHANNELS = 4


def build_vae(preset: Preset) -> AutoencoderKL:
    """A plain convolutional AutoencoderKL on RGB, f8; its latents have unit variance, so scaling_factor is 1."""
    levels = len(preset.vae_widths)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=preset.vae_widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=preset.vae_groups,
        sample_size=preset.resolution,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def build_unet(preset: Preset, text_width: int, *, guided: bool) -> UNet2DConditionModel:
    """The denoiser; `guided` adds the guidance embedding of LCM students."""
    return UNet2DConditionModel(
        sample_size=preset.latent,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=preset.unet_layers,
        block_out_channels=preset.unet_widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=preset.unet_heads,  # diffusers' name for the number of heads in this class
        norm_num_groups=preset.unet_groups,
        time_cond_proj_dim=preset.guidance_width if guided else None,
    )


def frozen(network: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """The network for inference: on the device, in `dtype`, channels-last, without gradients."""
    return network.to(device=device, dtype=dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def millions(network: nn.Module) -> float:
    """Parameters, in millions."""
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6
