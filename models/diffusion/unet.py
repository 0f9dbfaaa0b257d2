"""UNets: diffusers' own classes, loaded strictly and laid out for convolutions."""

from __future__ import annotations

from typing import Any

import torch

from models.diffusion.folder import Folder, load_module, quiet_libraries
from models.errors import ModelError


def load_unet(folder: Folder, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the UNet in subfolder `name`; "unet_lcm" is of the class of "unet"."""
    path = folder.path / name / "config.json"
    if folder.pipeline == "ConsistencyModelPipeline":
        folder.component("unet", ("UNet2DModel",))
    else:
        folder.component("unet", ("UNet2DConditionModel",))
    config = folder.config(name)
    if config.get("in_channels") != config.get("out_channels"):
        raise ModelError(
            f"{path}: in_channels {config.get('in_channels')} is not out_channels {config.get('out_channels')}; "
            "inpainting and variance-predicting UNets are not served"
        )
    if config.get("sample_size") is None:
        raise ModelError(f"{path}: sample_size is missing, so the size of the model's own pictures is not known")
    for key, wanted in _expected(folder.pipeline).items():
        if config.get(key) != wanted:
            raise ModelError(f"{path}: {key} is {config.get(key)!r}; served in a {folder.pipeline} is {wanted!r}")
    with quiet_libraries():
        unet = load_module(_class(folder), folder.path / name, dtype, dtype_argument="torch_dtype")
    return place(unet, device)


def place(unet: Any, device: torch.device) -> Any:
    """To the device, with channels last: the layout in which convolutions run fastest on both kinds."""
    return unet.to(device=device, memory_format=torch.channels_last)


def _expected(pipeline: str) -> dict[str, str | None]:
    """What the denoiser knows how to condition, by config key."""
    if pipeline == "ConsistencyModelPipeline":
        return {"class_embed_type": None}
    addition = "text_time" if pipeline == "StableDiffusionXLPipeline" else None
    unused = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    return {"addition_embed_type": addition, **dict.fromkeys(unused)}


def _class(folder: Folder) -> Any:
    if folder.pipeline == "ConsistencyModelPipeline":
        from diffusers.models.unets.unet_2d import UNet2DModel

        return UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel
