"""Sizes: parameter counts against the published models, and small random models that draw."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.bundles import registry
from models.bundles.manifest import read_manifest
from models.errors import ModelError
from models.specs import SPECS, random_model
from tests.models.diffusion.test_equivalence import draw, noise_for

# Of the published checkpoints' files.
UNET_PARAMETERS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}
VAE_PARAMETERS = 83_653_863
SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "sample_size": 8,
    "layers_per_block": 1,
}


@pytest.mark.parametrize("name", UNET_PARAMETERS)
def test_published_sizes(name: str) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SPECS[name].unet), AutoencoderKL(**SPECS[name].vae)
    assert sum(weight.numel() for weight in unet.parameters()) == UNET_PARAMETERS[name]
    assert sum(weight.numel() for weight in vae.parameters()) == VAE_PARAMETERS


def test_the_default_bundle_is_what_its_spec_says() -> None:
    """A random model of the spec stands in for the bundle where there is no network and no text tower."""
    spec, root = SPECS["headstart-v2"], registry.ROOTS["default"]
    for folder, stated in (
        ("unet/config.json", spec.unet),
        ("unet_lcm/config.json", {**spec.unet, **(spec.student or {})}),
        ("vae/config.json", spec.vae),
        ("scheduler/scheduler_config.json", spec.scheduler),
    ):
        config = json.loads((root / folder).read_text())
        assert {key: config[key] for key in stated} == json.loads(json.dumps(stated)), folder
    if read_manifest(root).name == spec.name:
        tokenizer = json.loads((root / "tokenizer/tokenizer_config.json").read_text())
        assert tokenizer["model_max_length"] == spec.text_tokens


@pytest.mark.parametrize("name", SPECS)
def test_random_model_draws(name: str) -> None:
    spec = SPECS[name]
    unet = dict(spec.unet) | SMALL
    if spec.kind == "sdxl":
        unet |= {
            "transformer_layers_per_block": 1,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 12,
        }
    pooled = 12 if spec.pooled_width else None
    vae = dict(spec.vae) | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    model = random_model(replace(spec, unet=unet, vae=vae, pooled_width=pooled), "float32", "cpu")
    assert model.card.default_size == (64, 64)
    noise = noise_for(model, 1)
    for sampler in {model.card.default_sampler, "ddim"}:
        pictures = []
        for prompt in ("a cat", "a dog", "a cat"):
            conditions = model.encode([(prompt, "")], [3.0], sampler, (64, 64))
            pictures.append(draw(model, sampler, 2, conditions, noise))
        np.testing.assert_array_equal(pictures[0], pictures[2])
        assert not np.array_equal(pictures[0], pictures[1])


def test_unknown_spec() -> None:
    with pytest.raises(ModelError, match="there is no spec 'sd9'; there are: sd15, sd21, sdxl, headstart-v2"):
        random_model("sd9")
