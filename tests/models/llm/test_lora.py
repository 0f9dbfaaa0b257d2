"""LoRA adapters: merged at load, they are what PEFT makes of them; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from models.errors import LoraError
from models.llm.loading import load_llm
from tests.models.llm import small

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # asked for by PEFT
PROMPT = [5, 9, 200, 3, 77]
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def adapter(path: Path, folder: Path, **changes: Any) -> Path:
    """A random adapter of attention and feed-forward matrices, as PEFT saves it."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(**settings | changes))
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 12}, "rank_pattern": {"layers.1.self_attn.v_proj": 2}}],
    ids=["plain", "rank-stabilised", "patterns"],
)
def test_a_merged_adapter_is_what_peft_makes_of_it(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora", folder, **changes)
    model = load_llm(str(folder), dtype="float32", device="cpu", cache_dir=tmp_path, lora=str(path))
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor([PROMPT])).logits[0]
        expected = PeftModel.from_pretrained(base, path)(torch.tensor([PROMPT])).logits[0]
    assert (plain - expected).abs().max() > 0.1
    torch.testing.assert_close(small.logits(model, [PROMPT])[0], expected, rtol=1e-4, atol=1e-4)


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"use_dora": True}, {}, "use_dora is True"),
        ({"bias": "all"}, {}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save is \['lm_head'\]"),
        ({"lora_alpha": "8"}, {}, "lora_alpha is '8', not a number"),
        ({}, {Q.format("A"): None}, "only half of model.layers.0.self_attn.q_proj.weight"),
        ({}, {Q.format("A"): torch.ones(4, 95)}, "wrong shapes for model.layers.0.self_attn.q_proj.weight"),
        ({}, {Q.format("A"): torch.ones(3, 96)}, "ranks 3 and 4 for model.layers.0.self_attn.q_proj.weight"),
        ({}, {"base_model.model.x": torch.ones(1)}, "base_model.model.x, which is not a matrix of a LoRA"),
        (
            {},
            {Q.format(half).replace("0", "7"): torch.ones(2, 2) for half in "AB"},
            "fit nothing in this model: model.layers.7",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    config: dict[str, Any], tensors: dict[str, torch.Tensor | None], message: str, folder: Path, tmp_path: Path
) -> None:
    path = adapter(tmp_path / "lora", folder)
    edit(path, **config)
    weights = load_file(path / "adapter_model.safetensors") | tensors
    save_file({name: value for name, value in weights.items() if value is not None}, path / "adapter_model.safetensors")
    with pytest.raises(LoraError, match=message):
        load_llm(str(folder), dtype="float32", device="cpu", cache_dir=tmp_path, lora=str(path))


def test_missing_and_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora", folder)
    weights = path / "adapter_model.safetensors"
    for damage, message in (
        (lambda: weights.write_bytes(weights.read_bytes()[:-9]), "damaged or cut short"),
        (weights.unlink, "adapter_model.safetensors is missing"),
        ((path / "adapter_config.json").unlink, "adapter_config.json is missing"),
    ):
        damage()
        with pytest.raises(LoraError, match=message):
            load_llm(str(folder), dtype="float32", device="cpu", cache_dir=tmp_path, lora=str(path))
