"""From a name to a model: what answers to it, and what is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from models.bundles import registry
from models.bundles.registry import Roots
from models.diffusion.loading import load_model
from models.errors import ModelError
from models.llm.loading import LanguageModel, load_llm
from tests.models.llm import small

PROMPT = [5, 9, 200, 3, 77]
NORM = "model.norm.weight"


def load(name: str | Path, cache_dir: Path) -> LanguageModel:
    return load_llm(str(name), dtype="float32", device="cpu", cache_dir=cache_dir)


def test_the_card_says_what_may_be_asked(folder: Path, tmp_path: Path) -> None:
    model = load(folder, tmp_path)
    card = model.card
    assert (card.name, card.source, card.revision) == ("tiny-llama", str(folder), "local")
    assert (card.max_positions, card.has_chat) == (128, True)
    assert model.tokenizer.stop_tokens == {2}


def test_a_model_may_lie_in_several_files(folder: Path, tmp_path: Path) -> None:
    parts = Path(shutil.copytree(folder, tmp_path / "parts"))
    (parts / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(parts, max_shard_size="200KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    whole, split = load(folder, tmp_path), load(parts, tmp_path)
    assert torch.equal(small.logits(whole, [PROMPT])[0], small.logits(split, [PROMPT])[0])
    next(parts.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-\d+.safetensors is missing"):
        load(parts, tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "model.gguf", ""])
def test_a_name_that_nothing_answers_to_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is neither default, nor a folder, nor a \.gguf file, nor a hub id"):
        load(name, tmp_path)


@pytest.mark.usefixtures("language_roots")
def test_bundles_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="bundle 'tiny' is a diffusion model; it writes no text"):
        load("tiny", tmp_path)
    with pytest.raises(ModelError, match="run `headstart models pull`"):
        load("writer", tmp_path)


def test_a_pulled_bundle_is_loaded_by_name(language_roots: Roots, tmp_path: Path) -> None:
    folder = registry.pull("writer", tmp_path, roots=language_roots)
    assert [entry.name for entry in (tmp_path / "llm").iterdir() if entry.is_dir()]  # converted already
    assert registry.verify("writer", tmp_path, roots=language_roots).kind == "language"
    assert [status.pulled for status in registry.list_bundles(tmp_path, roots=language_roots)] == [False, True]
    card = load("writer", tmp_path).card
    assert (card.name, card.source, card.revision) == ("tiny-writer", "writer", "2.0.0")
    with pytest.raises(ModelError, match="bundle 'writer' is a language model; it draws no pictures"):
        load_model("writer", cache_dir=tmp_path)
    file = folder / "tiny.gguf"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    with pytest.raises(ModelError, match=r"tiny\.gguf is altered"):
        registry.verify("writer", tmp_path, roots=language_roots)


def test_what_is_wrong_with_weights_is_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "model.safetensors"
    weights = load_file(path)
    for change, message in (
        ({NORM: None}, f"lacks {NORM}"),
        ({"model.extra.weight": torch.ones(1)}, "has unknown model.extra.weight"),
        ({NORM: torch.ones(5)}, f"has wrong shapes for {NORM}"),
    ):
        changed = {name: value for name, value in (weights | change).items() if value is not None}
        save_file(changed, path)
        with pytest.raises(ModelError, match=message):
            load(copy, tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelError, match="is damaged or cut short"):
        load(copy, tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        load(copy, tmp_path)


def test_a_copy_of_the_tied_embedding_is_harmless(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, copy / "model.safetensors")
    assert torch.equal(
        small.logits(load(copy, tmp_path), [PROMPT])[0], small.logits(load(folder, tmp_path), [PROMPT])[0]
    )


def test_a_tokenizer_of_another_model_is_told(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ModelError, match=r"288 tokens in tokenizer\.json, 100 in"):
        load(copy, tmp_path)
