"""From latents to pixels."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from models.diffusion.folder import Folder, load_module

# Decoded at once. The decoder's activations are some KB a pixel: more would strain a GPU's memory, and on a CPU its
# caches, which makes the pictures of a large batch a fifth slower each.
MAX_DECODE_PIXELS = {"cuda": 1 << 20, "cpu": 1 << 17}


class Decoder(Protocol):
    """[B, C, h, w] float32 latents -> [B, H, W, 3] uint8 pictures."""

    scale: int  # pixels per latent cell along one side

    def __call__(self, latents: torch.Tensor) -> torch.Tensor: ...


class LatentDecoder:
    """A variational autoencoder's decoder, `AutoencoderKL`."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._dtype = vae.dtype
        config = vae.config
        self.scale = 2 ** (len(config.block_out_channels) - 1)
        self.channels = int(config.latent_channels)
        self._affine = self._unscale(config)

    @property
    def network(self) -> Any:
        """The AutoencoderKL."""
        return self._vae

    def _unscale(self, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(factor, shift) per channel, [1, C, 1, 1] each: what turns the UNet's latents into the decoder's."""
        channels = config.latent_channels
        factor = torch.full((1, channels, 1, 1), 1.0 / config.scaling_factor, device=self._vae.device)
        shift = torch.zeros_like(factor)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            factor = factor * factor.new_tensor(std).view(1, -1, 1, 1)
            shift = shift + shift.new_tensor(mean).view(1, -1, 1, 1)
        elif (offset := config.get("shift_factor")) is not None:
            shift = shift + offset
        return factor, shift

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        factor, shift = self._affine
        latents = torch.addcmul(shift, latents, factor)
        latents = latents.to(self._dtype, memory_format=torch.channels_last)
        pixels = latents.shape[2] * latents.shape[3] * self.scale**2
        parts = latents.split(max(1, MAX_DECODE_PIXELS[latents.device.type] // pixels))
        return torch.cat([to_uint8(self._vae.decode(part, return_dict=False)[0]) for part in parts])


class PixelDecoder:
    """For models that draw in pixels: there is nothing to decode."""

    scale = 1

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return to_uint8(latents)


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, H, W, 3] uint8, rounded as diffusers' VaeImageProcessor rounds (half to even)."""
    unit = (pictures.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def load_decoder(folder: Folder, device: torch.device, dtype: torch.dtype) -> LatentDecoder:
    """Load vae/. A VAE whose config asks for it (force_upcast) is kept in float32 where the model runs in float16."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    folder.component("vae", ("AutoencoderKL",))
    if dtype == torch.float16 and folder.config("vae").get("force_upcast", False):
        dtype = torch.float32
    vae = load_module(AutoencoderKL, folder.path / "vae", dtype, dtype_argument="torch_dtype")
    return make_decoder(vae, device)


def make_decoder(vae: Any, device: torch.device) -> LatentDecoder:
    """A decoder from a loaded AutoencoderKL. The encoder is dropped: nothing here encodes pictures."""
    vae.encoder = None
    vae.quant_conv = None
    return LatentDecoder(vae.to(device=device, memory_format=torch.channels_last))
