"""LoRA adapters of language models (Hu et al. 2021), in PEFT's format: merged into the weights as these are read.

A folder with adapter_config.json and adapter_model.safetensors, as PEFT's save_pretrained writes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.diffusion.folder import listing, one_line, read_json
from models.errors import LoraError, ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None, "lora_bias": False}


class Lora:
    """An adapter: for some matrices, by their names in the model, what is added to them.

    Raises:
        LoraError: a file is missing or damaged, or the adapter is of a kind that cannot be merged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            config = read_json(folder / CONFIG)
        except ModelError as error:
            raise LoraError(str(error)) from None
        for name, plain in PLAIN.items():
            if (config.get(name) or plain) != plain:
                raise LoraError(
                    f"{folder / CONFIG}: {name} is {config[name]!r}; merged are adapters with {plain!r} only"
                )
        self._downs, self._ups = _matrices(folder / WEIGHTS)
        self._scales = {name: _scale(config, name, len(down), folder) for name, down in self._downs.items()}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """LoraError unless the adapter fits matrices of these shapes."""
        strangers = sorted(name for name in self._downs if name not in shapes)
        if strangers:
            raise LoraError(f"{self._folder / WEIGHTS} has keys that fit nothing in this model: {listing(strangers)}")
        wrong = sorted(
            name for name in self._downs if (self._ups[name].shape[0], self._downs[name].shape[1]) != shapes[name]
        )
        if wrong:
            raise LoraError(f"{self._folder / WEIGHTS} has wrong shapes for {listing(wrong)}")

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """W + scale B A, in float32; the weight itself if the adapter has nothing for it."""
        if name not in self._downs:
            return weight
        update = self._ups[name].float() @ self._downs[name].float()
        return torch.add(weight.float(), update, alpha=self._scales[name])


def _matrices(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A [r, in] and B [out, r] by the name of the weight that they belong to."""
    if not path.is_file():
        raise LoraError(f"{path} is missing")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path} is damaged or cut short: {one_line(error)}") from None
    halves: dict[str, dict[str, torch.Tensor]] = {"A": {}, "B": {}}
    for key, value in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or value.ndim != 2:
            raise LoraError(f"{path} has {key}, which is not a matrix of a LoRA")
        halves[match[2]][f"{match[1]}.weight"] = value
    downs, ups = halves["A"], halves["B"]
    single = sorted(downs.keys() ^ ups.keys())
    if single or not downs:
        raise LoraError(f"{path} has only half of {listing(single)}" if single else f"{path} holds no LoRA")
    for name, down in downs.items():
        if len(down) != ups[name].shape[1]:
            raise LoraError(f"{path} has matrices of ranks {len(down)} and {ups[name].shape[1]} for {name}")
    return downs, ups


def _scale(config: Mapping[str, Any], name: str, rank: int, folder: Path) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023). A layer may have its own alpha."""
    module = name.removesuffix(".weight")
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    alpha = config.get("lora_alpha") if alpha is None else alpha
    if not isinstance(alpha, (int, float)):
        raise LoraError(f"{folder / CONFIG}: lora_alpha is {alpha!r}, not a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
