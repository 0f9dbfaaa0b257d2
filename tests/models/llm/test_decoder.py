"""The decoder against transformers' Llama: same weights, same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from models.bundles import registry
from models.llm.loading import load_llm
from service.config import ModelSettings
from tests.models.llm import small

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "one key-value head a query head": {"num_key_value_heads": 6},
    "one key-value head": {"num_key_value_heads": 1},
    "heads wider than the hidden size": {"head_dim": 32},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3 scaling": {"rope_parameters": LLAMA3},
}
PROMPTS = [[5, 9, 200, 3, 77, 12, 13, 14, 15, 90, 91], [1], [2, 3, 4, 250]]


@torch.no_grad()
def stock(folder: Path, prompt: list[int]) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([prompt])).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = small.llama(tmp_path / "model", **KINDS[kind])
    model = load_llm(str(folder), dtype="float32", device="cpu", cache_dir=tmp_path)
    for prompt, got in zip(PROMPTS, small.logits(model, PROMPTS), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, stock(folder, prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_the_same_but_for_rounding(dtype: str, folder: Path, tmp_path: Path) -> None:
    exact = load_llm(str(folder), dtype="float32", device="cpu", cache_dir=tmp_path)
    rounded = load_llm(str(folder), dtype=dtype, device="cpu", cache_dir=tmp_path)
    (expected,), (got,) = small.logits(exact, PROMPTS[:1]), small.logits(rounded, PROMPTS[:1])
    assert rounded.decoder.dtype == getattr(torch, dtype)
    assert got.dtype == torch.float32
    assert 0 < (got - expected).norm() / expected.norm() < 0.05


def test_the_default_model_is_that_of_transformers() -> None:
    cache_dir = ModelSettings().cache_dir
    folder = registry.language_folder("smollm2", cache_dir)
    model = load_llm("default", dtype="float32", device="cpu", cache_dir=cache_dir)
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": "kitty n a hat pls, bluish"}])
    (got,) = small.logits(model, [prompt])
    expected = stock(folder, prompt)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    # Two orders of float32 sums through 30 layers, logits of up to 40: either is as far from float64 as from the other.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-4)
    best = got.argmax(-1, keepdim=True)
    torch.testing.assert_close(
        got.log_softmax(-1).gather(-1, best), expected.log_softmax(-1).gather(-1, best), rtol=0, atol=1e-4
    )
