"""Weights in transformers' format, read strictly: every one the decoder needs, in its shape, and none left over."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from models.diffusion.folder import listing, one_line, read_json
from models.errors import ModelError
from models.llm.config import LlmConfig
from models.llm.decoder import Decoder
from models.llm.lora import Lora

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPUTED = (".rotary_emb.inv_freq",)  # saved by old versions of transformers, and worked out here


def fill(decoder: Decoder, folder: Path, lora: Lora | None = None) -> None:
    """Copy a folder's weights into the decoder, with a LoRA merged into them.

    Files are mapped and copied tensor by tensor, each cast as it is copied, so that the model is never in memory twice.

    Raises:
        ModelError: a file or tensor is missing, damaged, left over or of another shape; LoraError for the LoRA.
    """
    parts = _parts(decoder.config)
    shapes = {name: shape for rows in parts.values() for name, shape in rows.items()}
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _check(tensors, shapes, folder, tied=decoder.config.tied_embeddings)
        if lora is not None:
            lora.check(shapes)
        for target, rows in parts.items():
            weight, start = _weight(decoder, target), 0
            for name, shape in rows.items():
                value = tensors[name].get_tensor(name)
                if lora is not None:
                    value = lora.merged(name, value)
                weight[start : start + shape[0]].copy_(value)
                start += shape[0]
    decoder.pack()


Shape = tuple[int, ...]


def _parts(config: LlmConfig) -> dict[str, dict[str, Shape]]:
    """For each of the decoder's parameters the tensors that it is made of, one below the other, and their shapes."""
    hidden, ffn = config.hidden_size, config.ffn_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    parts: dict[str, dict[str, Shape]] = {
        "embedding": {"model.embed_tokens.weight": (config.vocab_size, hidden)},
        "norm": {"model.norm.weight": (hidden,)},
    }
    if not config.tied_embeddings:
        parts["head"] = {"lm_head.weight": (config.vocab_size, hidden)}
    for layer in range(config.layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        parts[ours + "attention_norm"] = {theirs + "input_layernorm.weight": (hidden,)}
        parts[ours + "qkv"] = {
            theirs + "self_attn.q_proj.weight": (q, hidden),
            theirs + "self_attn.k_proj.weight": (kv, hidden),
            theirs + "self_attn.v_proj.weight": (kv, hidden),
        }
        parts[ours + "out"] = {theirs + "self_attn.o_proj.weight": (hidden, q)}
        parts[ours + "ffn_norm"] = {theirs + "post_attention_layernorm.weight": (hidden,)}
        parts[ours + "gate_up"] = {
            theirs + "mlp.gate_proj.weight": (ffn, hidden),
            theirs + "mlp.up_proj.weight": (ffn, hidden),
        }
        parts[ours + "down"] = {theirs + "mlp.down_proj.weight": (hidden, ffn)}
    return parts


def _weight(decoder: Decoder, path: str) -> torch.Tensor:
    *layer, name = path.split(".")
    weight: torch.Tensor = getattr(decoder.layers[int(layer[1])] if layer else decoder, name)
    return weight


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, safe_open]:
    """The open file of each tensor."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    tensors: dict[str, safe_open] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path} is missing")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))  # compares the header with the file's size
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged or cut short: {one_line(error)}") from None
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def _check(tensors: Mapping[str, safe_open], shapes: Mapping[str, Shape], folder: Path, *, tied: bool) -> None:
    harmless = ("lm_head.weight", *COMPUTED) if tied else COMPUTED  # a copy of the embedding, where it is tied
    lacking = sorted(shapes.keys() - tensors.keys())
    unknown = sorted(name for name in tensors.keys() - shapes.keys() if not name.endswith(harmless))
    wrong = sorted(name for name in shapes.keys() & tensors.keys() if _shape(tensors[name], name) != shapes[name])
    for what, names in (("lacks", lacking), ("has unknown", unknown), ("has wrong shapes for", wrong)):
        if names:
            raise ModelError(f"{folder} {what} {listing(names)}")


def _shape(file: safe_open, name: str) -> Shape:
    return tuple(file.get_slice(name).get_shape())
