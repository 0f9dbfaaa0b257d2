"""GGUF files: the numbers, sizes and tokenizers that come out of them, and what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from models.errors import ModelError
from models.llm import gguf as conversion
from models.llm.gguf import converted_folder
from models.llm.loading import load_llm
from tests.models.llm import small

Types = gguf.GGMLQuantizationType
PROMPT = [5, 9, 200, 3, 77]
TEXTS = ["the 12 hats", "  a\n\n12 b ", "<|im_start|>user\nthé 🎨<|im_end|>", ""]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "▁t", "he", "▁the"]


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(path: Path, cache_dir: Path) -> torch.Tensor:
    return small.logits(load_llm(str(path), dtype="float32", device="cpu", cache_dir=cache_dir), [PROMPT])[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_file_is_the_model_it_was_made_of(tied: bool, tmp_path: Path) -> None:
    folder = small.llama(tmp_path / "model", tie_word_embeddings=tied)
    path = small.llama_gguf(tmp_path / "m.gguf", LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    expected = small.logits(load_llm(str(folder), dtype="float32", device="cpu", cache_dir=tmp_path), [PROMPT])[0]
    torch.testing.assert_close(logits(path, tmp_path), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Types.F16, Types.BF16, Types.Q8_0, Types.Q4_0, Types.Q4_1])
def test_quantised_files_hold_what_gguf_makes_of_them(kind: Types, model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = small.llama_gguf(tmp_path / "m.gguf", model, kind)
    rounded = LlamaForCausalLM(model.config)
    weights = dict(model.state_dict())
    for name, value in weights.items():
        if value.ndim == 2:
            weights[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind))
    rounded.load_state_dict(weights)
    with torch.no_grad():
        expected = rounded(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits(path, tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_llama_3s_scaling_is_known_by_its_factors(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"rope_theta": 10000.0, "original_max_position_embeddings": 8192}
    folder = small.llama(tmp_path / "model", rope_parameters=scaling, head_dim=32)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = 1 / 10000.0 ** (torch.arange(0, 32, 2) / 32)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.min() == 1 < factors.max()
    path = small.llama_gguf(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": factors})
    written = json.loads((converted_folder(path, tmp_path) / "config.json").read_text())["rope_scaling"]
    assert written == {key: value for key, value in scaling.items() if key != "rope_theta"}
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits(path, tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_linear_scaling_is_read(model: LlamaForCausalLM, tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    folder = converted_folder(small.llama_gguf(tmp_path / "m.gguf", model, metadata=metadata), tmp_path)
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_a_byte_level_tokenizer_is_rebuilt(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = converted_folder(small.llama_gguf(tmp_path / "m.gguf", model), tmp_path)
    got, expected = Tokenizer.from_file(str(folder / "tokenizer.json")), small.backend()
    for text in TEXTS:
        assert got.encode(text).ids == expected.encode(text).ids
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["chat_template"]) == ("<|im_end|>", small.TEMPLATE)


@pytest.mark.parametrize("merged", [False, True])
def test_a_sentence_piece_tokenizer_is_that_of_transformers(
    merged: bool, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    filler = [f"<filler{index}>" for index in range(small.SIZES["vocab_size"] - len(PIECES))]
    tokens = PIECES + filler
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.merges": ["▁ t", "h e", "▁t he"] if merged else None,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }
    path = small.llama_gguf(tmp_path / "m.gguf", model, metadata=metadata)
    got = Tokenizer.from_file(str(converted_folder(path, tmp_path) / "tokenizer.json"))
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("the the", "hat, é!", "the</s>"):
        ids = got.encode(text).ids
        assert ids[0] == 1
        assert ids[1:] == expected.encode(text, add_special_tokens=False)
        assert got.decode(ids) == text.removesuffix("</s>")
    # Llama puts a space before every text, also before one that starts with spaces; transformers reads GGUF otherwise.
    assert got.encode("  the").ids == [1, tokens.index("▁"), tokens.index("▁"), tokens.index("▁the")]
    assert got.decode(got.encode("  the").ids) == "  the"


def test_it_is_converted_once_by_digest(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    convert = conversion.convert
    monkeypatch.setattr(conversion, "convert", lambda path, folder: (calls.append(path), convert(path, folder))[1])
    path = small.llama_gguf(tmp_path / "m.gguf", model)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: converted_folder(path, tmp_path), range(4)))
    moved = path.rename(tmp_path / "moved.gguf")
    assert folders == {converted_folder(moved, tmp_path)}
    assert calls == [path]
    assert [folder.name for folder in (tmp_path / "llm").iterdir() if folder.is_dir()] == [folders.pop().name]


WRONG: dict[str, tuple[Mapping[str, Any], str]] = {
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, "its tokenizer is 'gpt2'"),
    "another tokenizer": ({"tokenizer.ggml.model": "bert"}, "its tokenizer is 'bert'; served are gpt2, llama"),
    "another split": ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre is 'viking'; served are default,"),
    "no merges": ({"tokenizer.ggml.merges": None}, "lacks tokenizer.ggml.merges"),
    "merges of one": ({"tokenizer.ggml.merges": ["the"]}, "tokenizer.ggml.merges has 'the'"),
    "merges of strangers": ({"tokenizer.ggml.merges": ["zzz the"]}, "its tokenizer cannot be built"),
    "an end that is not there": ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999, and there are 288"),
    "no layers": ({"llama.block_count": None}, "lacks num_hidden_layers"),
    "more layers": ({"llama.block_count": 3}, "lacks model.layers.2."),
    "experts": ({"llama.expert_count": 8}, "a mixture of 8 experts"),
    "yarn": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "rope_type is 'yarn'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_metadata_that_is_not_served_is_named(what: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    metadata, message = WRONG[what]
    refused(small.llama_gguf(tmp_path / "m.gguf", model, metadata=metadata), tmp_path, message)


def test_other_architectures_and_tensors_are_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = small.llama_gguf(tmp_path / "gemma.gguf", model, architecture="gemma")
    refused(path, tmp_path, "general.architecture is 'gemma'; served is 'llama'")
    one = np.ones(8, np.float32)
    for name, message in (("blk.0.attn_q.bias", "has unknown blk.0.attn_q.bias"), ("rope_freqs.weight", "other than")):
        path = small.llama_gguf(tmp_path / f"{name}.gguf", model, tensors={name: 3 * one})
        refused(path, tmp_path, message)


def test_damage_is_told_in_one_line_and_leaves_nothing(model: LlamaForCausalLM, tmp_path: Path) -> None:
    whole = small.llama_gguf(tmp_path / "m.gguf", model).read_bytes()
    for size in (0, 3, 20, 1000, len(whole) - 100):
        path = tmp_path / f"{size}.gguf"
        path.write_bytes(whole[:size])
        refused(path, tmp_path, "is not a whole GGUF file")
    path.write_bytes(b"\0" * 4096)
    refused(path, tmp_path, "is not a whole GGUF file")
    assert not [entry for entry in (tmp_path / "llm").iterdir() if entry.is_dir()]


def refused(path: Path, cache_dir: Path, message: str) -> None:
    with pytest.raises(ModelError) as told:
        load_llm(str(path), dtype="float32", device="cpu", cache_dir=cache_dir)
    assert message in str(told.value)
    assert "\n" not in str(told.value)
