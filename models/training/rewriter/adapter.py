"""Low-rank adapters (Hu et al. 2021) of a decoder's linear layers, and their file in PEFT's format."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class AdaptedLinear(nn.Module):
    """y = W x + (alpha / rank) B A x, with W frozen; A and B stay in float32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        device = base.weight.device
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        return y + self.scale * F.linear(F.linear(x.to(self.a.dtype), self.a), self.b).to(y.dtype)


def adapt(model: nn.Module, rank: int, alpha: float) -> dict[str, AdaptedLinear]:
    """Put adapters into all TARGETS of the model; returns them by the names of the layers that they stand in for."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _is_target(name)]
    adapters = {}
    for name in found:
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        adapters[name] = AdaptedLinear(getattr(holder, leaf), rank, alpha)
        setattr(holder, leaf, adapters[name])
    return adapters


def _is_target(name: str) -> bool:
    return name.rpartition(".")[2] in TARGETS


def weights(adapters: dict[str, AdaptedLinear]) -> dict[str, torch.Tensor]:
    """Tensors by PEFT's names, as they are."""
    return {
        f"base_model.model.{name}.lora_{matrix.upper()}.weight": getattr(adapter, matrix).detach()
        for name, adapter in adapters.items()
        for matrix in ("a", "b")
    }


def load(adapters: dict[str, AdaptedLinear], tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `weights` gave."""
    own = weights(adapters)
    for name, value in own.items():
        value.copy_(tensors[name])


def save(adapters: dict[str, AdaptedLinear], folder: Path, base: str) -> Path:
    """Write the adapter in float16 and its configuration, for peft and models.llm; returns the path of the weights."""
    one = next(iter(adapters.values()))
    rank = one.a.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": one.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(TARGETS),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.half().cpu().contiguous() for name, value in weights(adapters).items()}
    save_file(half, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder / WEIGHTS
