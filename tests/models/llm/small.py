"""Tiny random Llamas: as transformers' folders and as GGUF files, and one pass of our decoder over them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

from accel.attention.batch import PagedAttend, TokenBatch
from accel.memory.paged_kv import PagedKV
from models.llm.loading import LanguageModel

PAGE = 4
SIZES = {  # three query heads to a key-value head, as SmolLM2; rows are whole blocks of 32 for quantisation
    "vocab_size": 288,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens, every byte, and what the merges make; then filler up to the model's size."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    return tokens + [f"<filler{index}>" for index in range(SIZES["vocab_size"] - len(tokens))]


def llama(folder: Path, **changes: Any) -> Path:
    """A folder in transformers' format, with the tokenizer that `llama_gguf` describes."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"bos_token_id": 1, "eos_token_id": 2} | changes)
    LlamaForCausalLM(config).save_pretrained(folder)
    backend().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def backend() -> Tokenizer:
    """SmolLM's kind: byte-level, digits on their own."""
    pairs = [tuple(merge.split()) for merge in MERGES]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(vocabulary())}, pairs))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def llama_gguf(
    path: Path,
    model: LlamaForCausalLM,
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    architecture: str = "llama",
) -> Path:
    """A model as llama.cpp's converter writes it: matrices quantised, vectors not; queries and keys interleaved.

    Args:
        metadata: more of it, or other; None leaves a key out.
        tensors: more of them, in float32.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    given: dict[str, Any] = {
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.rope.dimension_count": config.head_dim,
        f"{architecture}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary(),
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in vocabulary()],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    for key, value in (given | dict(metadata or {})).items():
        _add(writer, key, value)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    for name, value in weights.items():
        theirs = _name(name)
        if theirs.endswith(("attn_q.weight", "attn_k.weight")):
            heads = len(value) // config.head_dim
            value = value.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if value.ndim == 2:
            writer.add_tensor(theirs, gguf.quantize(value, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(theirs, value)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _name(name: str) -> str:
    for theirs, ours in (
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ):
        name = name.replace(theirs, ours)
    return name


def logits(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """[L, V] of every token of each prompt, all prompts in one flattened batch over a paged cache."""
    config = model.config
    sizes = [len(prompt) for prompt in prompts]
    width = max(-(-size // PAGE) for size in sizes)
    count = len(prompts) * width
    kv = PagedKV(config.layers, count, PAGE, config.kv_heads, config.head_dim, model.decoder.dtype, "cpu")
    tables = torch.randperm(count, generator=torch.Generator().manual_seed(0), dtype=torch.int32).view(-1, width)
    positions = torch.cat([torch.arange(size) for size in sizes])
    rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(sizes))
    slots = tables[rows, positions // PAGE].long() * PAGE + positions % PAGE
    starts = torch.tensor([0, *sizes]).cumsum(0).int()
    attend = PagedAttend(kv, tables, slots, starts, torch.tensor(sizes, dtype=torch.int32), 0, config.scale)
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    out: torch.Tensor = model.decoder(TokenBatch(tokens, positions, torch.arange(len(tokens)), attend))
    return list(out.split(sizes))
