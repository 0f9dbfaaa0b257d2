"""Tiny random models in diffusers' folder format, each built in well under a second and with nothing downloaded.

Every builder takes an empty or missing folder, fills it as a stock pipeline's `save_pretrained` would, and returns it.
The weights are seeded, so that two folders of one kind hold the same model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

CLIP_LENGTH = 77
BERT_LENGTH = 24
WORDS = ["a", "red", "green", "blue", "apple", "cat", "dog", "fox", "on", "background", "and", "of", "two", "tiny"]
SD_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def sd(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """Stable Diffusion 1.5: CLIP text, PNDM scheduler config, 64x64 pictures."""
    _clip_tokenizer(folder / "tokenizer")
    _clip_text(folder / "text_encoder", hidden_size=32)
    _unet(folder / "unet", cross_attention_dim=32)
    _vae(folder / "vae")
    _scheduler(
        folder,
        "PNDMScheduler",
        SD_SCHEDULE
        | {
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "clip_sample": False,
            "prediction_type": prediction_type,
        },
    )
    return _index(folder, "StableDiffusionPipeline", tokenizer="CLIPTokenizer", text_encoder="CLIPTextModel")


def sd2(folder: Path) -> Path:
    """Stable Diffusion 2: a text encoder with OpenCLIP's activation, linear projections, v-prediction, DDIM config."""
    _clip_tokenizer(folder / "tokenizer")
    _clip_text(folder / "text_encoder", hidden_size=64, hidden_act="gelu", seed=7)
    _unet(folder / "unet", cross_attention_dim=64, use_linear_projection=True, attention_head_dim=(4, 8))
    _vae(folder / "vae")
    _scheduler(
        folder,
        "DDIMScheduler",
        SD_SCHEDULE | {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    )
    return _index(folder, "StableDiffusionPipeline", tokenizer="CLIPTokenizer", text_encoder="CLIPTextModel")


def sdxl(folder: Path) -> Path:
    """SDXL: two text encoders, pooled text and size conditioning, a VAE that must not run in float16."""
    _clip_tokenizer(folder / "tokenizer")
    _clip_tokenizer(folder / "tokenizer_2", pad_token="!")
    _clip_text(folder / "text_encoder", hidden_size=32)
    _clip_text(folder / "text_encoder_2", hidden_size=32, hidden_act="gelu", projection=True, seed=7)
    _unet(
        folder / "unet",
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    _vae(folder / "vae", scaling_factor=0.13025, force_upcast=True)
    _scheduler(folder, "EulerDiscreteScheduler", SD_SCHEDULE | {"prediction_type": "epsilon"})
    return _index(
        folder,
        "StableDiffusionXLPipeline",
        tokenizer="CLIPTokenizer",
        tokenizer_2="CLIPTokenizer",
        text_encoder="CLIPTextModel",
        text_encoder_2="CLIPTextModelWithProjection",
        force_zeros_for_empty_prompt=True,
    )


def lcm(folder: Path) -> Path:
    """A latent consistency model: the guidance scale is embedded in the network."""
    _clip_tokenizer(folder / "tokenizer")
    _clip_text(folder / "text_encoder", hidden_size=32)
    _unet(folder / "unet", cross_attention_dim=32, time_cond_proj_dim=16)
    _vae(folder / "vae")
    _scheduler(folder, "LCMScheduler", SD_SCHEDULE | {"clip_sample": False, "prediction_type": "epsilon"})
    return _index(folder, "LatentConsistencyModelPipeline", tokenizer="CLIPTokenizer", text_encoder="CLIPTextModel")


def bundle(folder: Path) -> Path:
    """The default bundle's kind: BERT text with a mask, v-prediction with zero terminal SNR, an LCM student."""
    schedule = SD_SCHEDULE | {
        "steps_offset": 0,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    bert(folder)
    _unet(folder / "unet", cross_attention_dim=32)
    _unet(folder / "unet_lcm", cross_attention_dim=32, time_cond_proj_dim=16, seed=8)
    _vae(folder / "vae")
    _scheduler(folder, "DDIMScheduler", schedule)
    _scheduler(folder, "LCMScheduler", schedule, name="scheduler_lcm")
    return _index(folder, "StableDiffusionPipeline", tokenizer="BertTokenizer", text_encoder="BertModel")


SIGMA_MIN = 0.029167  # of timestep 0 of SD_SCHEDULE rescaled to zero terminal SNR
CONSISTENCY = {
    "sigma_min": SIGMA_MIN,
    "sigma_max": 80.0,
    "sigma_data": 1.0,
    "guidance_scale": 3.0,
    "sigmas": {"1": [80.0], "2": [80.0, 1.5]},
}
MANIFEST = {
    "students": {"consistency": CONSISTENCY | {"lora": "lora/consistency.safetensors"}},
    "loras": {
        "lcm-lora": {"file": "lora/lcm.safetensors", "sampler": "lcm", "guidance_scale": 2.5},
        "tuned": CONSISTENCY
        | {"file": "lora/tuned.safetensors", "sampler": "consistency", "guidance_scale": 1.0, "sigmas": {}},
    },
}


def bundle_with_loras(folder: Path) -> Path:
    """`bundle` with students that are LoRA files of its teacher, named in its manifest."""
    bundle(folder)
    for seed, name in enumerate(("consistency", "lcm", "tuned"), start=1):
        lora(folder / "lora" / f"{name}.safetensors", folder, seed=seed)
    _write_json(folder / "manifest.json", MANIFEST)
    return folder


def lora(path: Path, folder: Path, *, seed: int = 1, rank: int = 4) -> Path:
    """A random LoRA, in diffusers' format, of the UNet's convolutions, attention and feed-forward layers."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, weight in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        if weight.ndim < 2 or not any(part in key for part in ("conv", "attn", "ff.net")):
            continue
        out, fan_in, *kernel = weight.shape
        name = f"unet.{key.removesuffix('.weight')}"
        down = torch.randn(rank, fan_in, *kernel, generator=generator)
        state[f"{name}.lora_A.weight"] = down / down[0].numel() ** 0.5
        state[f"{name}.lora_B.weight"] = 0.2 * torch.randn(out, rank, *[1] * len(kernel), generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def consistency(folder: Path, *, num_classes: int | None = None) -> Path:
    """A pixel-space consistency model, unconditional or class-conditional, 16x16 pictures."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    unet = _seeded(
        UNet2DModel,
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=num_classes,
        resnet_time_scale_shift="scale_shift",
    )
    unet.save_pretrained(folder / "unet")
    _scheduler(
        folder,
        "CMStochasticIterativeScheduler",
        {
            "num_train_timesteps": 40,
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "sigma_data": 0.5,
            "s_noise": 1.0,
            "rho": 7.0,
            "clip_denoised": True,
        },
    )
    index = {
        "_class_name": "ConsistencyModelPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
    }
    _write_json(folder / "model_index.json", index)
    return folder


def _index(folder: Path, pipeline: str, **components: Any) -> Path:
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if pipeline != "StableDiffusionXLPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    for name, value in components.items():
        index[name] = ["transformers", value] if isinstance(value, str) else value
    _write_json(folder / "model_index.json", index)
    return folder


def _seeded(cls: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(*args, **kwargs).eval()


def _unet(folder: Path, *, seed: int = 0, **config: Any) -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    defaults = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    _seeded(UNet2DConditionModel, seed=seed, **(defaults | config)).save_pretrained(folder)


def _vae(folder: Path, **config: Any) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = _seeded(
        AutoencoderKL,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        **({"force_upcast": False} | config),
    )
    vae.save_pretrained(folder)


def _clip_text(
    folder: Path, *, hidden_size: int, hidden_act: str = "quick_gelu", projection: bool = False, seed: int = 5
) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary = _clip_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act=hidden_act,
        projection_dim=32,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["!"],
        initializer_factor=10.0,  # CLIP's own gain leaves tiny models indifferent to their prompt
    )
    _seeded(CLIPTextModelWithProjection if projection else CLIPTextModel, config, seed=seed).save_pretrained(folder)


def bert(folder: Path) -> None:
    """The tokenizer and text encoder of `bundle` alone."""
    _bert_tokenizer(folder / "tokenizer")
    _bert_text(folder / "text_encoder")


def _bert_text(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(_bert_vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        use_attention_mask=True,
    )
    _seeded(BertModel, config, seed=5).save_pretrained(folder)


def _clip_vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += ["ap", "app", "app", "le</w>", "apple</w>", "re", "red</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _clip_tokenizer(folder: Path, *, pad_token: str = "<|endoftext|>") -> None:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(_clip_vocabulary()))
    merges = ["a p", "ap p", "l e</w>", "app le</w>", "r e", "re d</w>"]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad_token
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH, "do_lower_case": True} | special
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)


def _bert_vocabulary() -> list[str]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [f"##{letter}" for letter in letters]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *pieces, *(word for word in WORDS if len(word) > 1)]


def _bert_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(_bert_vocabulary()) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": BERT_LENGTH, "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", config)


def _scheduler(folder: Path, cls: str, config: Mapping[str, Any], *, name: str = "scheduler") -> None:
    (folder / name).mkdir(parents=True)
    values = {"_class_name": cls, "_diffusers_version": "0.36.0", **config}
    _write_json(folder / name / "scheduler_config.json", values)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
