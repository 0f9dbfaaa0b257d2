"""Model sizes as data, and models of these sizes with random weights for measurements.

Speed and memory do not depend on what the weights say, so that a benchmark needs neither their download nor a text
encoder: prompts are given random states.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from accel.samplers.schedules import NoiseSchedule
from models.diffusion import cards
from models.diffusion.denoiser import TextDenoiser
from models.diffusion.dtype import resolve_device, resolve_dtype
from models.diffusion.loaded import LoadedModel, Network
from models.diffusion.lora import LoraSet
from models.diffusion.model import ModelCard, TextStates
from models.diffusion.unet import place
from models.diffusion.vae import make_decoder
from models.errors import ModelError

SD_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
ZERO_SNR_SCHEDULER = SD_SCHEDULER | {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
SD_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SD_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
HEADSTART_UNET = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 192, 224),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 384,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
HEADSTART_VAE = SD_VAE | {
    "block_out_channels": (32, 48, 96, 192),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 256,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}


@dataclass(frozen=True, slots=True)
class Spec:
    """A model's sizes, as the configs of its diffusers components give them.

    student: what its LCM student's UNet config has besides; None: it has no student.
    pooled_width: of SDXL's pooled text state.
    """

    name: str
    kind: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text_tokens: int
    student: Mapping[str, Any] | None = None
    pooled_width: int | None = None


SPECS = {
    spec.name: spec
    for spec in (
        Spec("sd15", "sd", SD_UNET, SD_VAE, SD_SCHEDULER, text_tokens=77),
        Spec(
            "sd21",
            "sd",
            SD_UNET
            | {
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
            },
            SD_VAE | {"sample_size": 768},
            SD_SCHEDULER | {"prediction_type": "v_prediction"},
            text_tokens=77,
        ),
        Spec(
            "sdxl",
            "sdxl",
            SD_UNET
            | {
                "sample_size": 128,
                "block_out_channels": (320, 640, 1280),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": 2048,
                "attention_head_dim": (5, 10, 20),
                "transformer_layers_per_block": (1, 2, 10),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            SD_VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
            SD_SCHEDULER,
            text_tokens=77,
            pooled_width=1280,
        ),
        Spec(
            "headstart-v2",
            "sd",
            HEADSTART_UNET,
            HEADSTART_VAE,
            ZERO_SNR_SCHEDULER,
            text_tokens=32,
            student={"time_cond_proj_dim": 256},
        ),
    )
}


@dataclass(frozen=True, slots=True)
class RandomTextEncoder:
    """Random states instead of encoded prompts; the same prompt always gets the same ones."""

    spec: Spec
    device: torch.device
    dtype: torch.dtype
    _states: dict[str, TextStates] = field(default_factory=dict)

    def encode(self, prompts: Sequence[str], variant: Hashable = None) -> list[TextStates]:
        return [self._states.get(prompt) or self._states.setdefault(prompt, self._draw(prompt)) for prompt in prompts]

    def reader(self) -> Callable[[str], bool]:
        return lambda prompt: True

    def _draw(self, prompt: str) -> TextStates:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        hidden = torch.randn(self.spec.text_tokens, self.spec.unet["cross_attention_dim"], generator=generator)
        pooled = None
        if self.spec.pooled_width is not None:
            pooled = torch.randn(self.spec.pooled_width, generator=generator).to(self.device, self.dtype)
        return TextStates(hidden.to(self.device, self.dtype), pooled)


def random_model(spec: str | Spec, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """A model of a spec's size with random weights; `dtype` and `device` are as in `load_model`."""
    if isinstance(spec, str):
        if spec not in SPECS:
            raise ModelError(f"there is no spec {spec!r}; there are: {', '.join(SPECS)}")
        spec = SPECS[spec]
    where = resolve_device(device)
    form = resolve_dtype(dtype, where)
    prediction = spec.scheduler["prediction_type"]
    network = TextDenoiser(_random_unet(spec.unet, where, form), prediction)
    default, samplers = cards.latent_samplers(spec.kind, spec.scheduler)
    schedule = NoiseSchedule.from_config(spec.scheduler)
    networks = dict.fromkeys(samplers, Network(network, schedule))
    if spec.student is not None:
        student = TextDenoiser(_random_unet({**spec.unet, **spec.student}, where, form), prediction)
        networks["lcm"] = Network(student, schedule)
        default, samplers = cards.with_student(samplers)
    decoder = make_decoder(_random_vae(spec.vae, where, form), where)
    side = spec.unet["sample_size"] * decoder.scale
    card = ModelCard(
        name=spec.name,
        kind=spec.kind,
        source=str(Path(__file__).name),
        revision="random",
        default_size=(side, side),
        size_multiple=8,
        latent_channels=decoder.channels,
        scale=decoder.scale,
        max_prompt_tokens=spec.text_tokens,
        num_classes=None,
        default_sampler=default,
        samplers=samplers,
    )
    text = RandomTextEncoder(spec, where, form)
    return LoadedModel(card, where, form, networks, decoder, LoraSet(), text, zero_negative=spec.kind == "sdxl")


def _random_unet(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with device:
        unet = UNet2DConditionModel(**config)
    return place(unet.to(dtype).requires_grad_(False).eval(), device)


def _random_vae(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with device:
        vae = AutoencoderKL(**config)
    return vae.to(dtype).requires_grad_(False).eval()
