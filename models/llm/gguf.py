"""GGUF files, llama.cpp's, converted once into a folder in transformers' format.

The folder holds config.json, model.safetensors, tokenizer.json and tokenizer_config.json. Reading the file itself takes
seconds, most of them for the vocabulary; loading the folder takes a fraction of one. Quantised weights become float32,
so that the folder holds exactly the numbers of the file.

Format: ggml-org/ggml, docs/gguf.md. Tensor names and metadata keys are those of architecture "llama".
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file

from accel.kernels.rope import Llama3Scaling, rope_table
from models.bundles.manifest import sha256
from models.diffusion.folder import one_line
from models.errors import ModelError
from models.llm.config import LlmConfig
from models.llm.gguf_tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

FORMAT = 1  # of the converted folder: a higher number has every file converted anew
ARCHITECTURE = "llama"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
ROPE_FACTORS = "rope_freqs.weight"  # by how much each frequency is divided: Llama 3's scaling, written out
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}  # kept as they are


def converted_folder(path: Path, cache_dir: Path, digest: str | None = None) -> Path:
    """The folder made from a GGUF file; made now if it is not there yet. Safe in several processes at once.

    Args:
        digest: the file's sha256 if it is known; computed otherwise.

    Raises:
        ModelError: the file is damaged or holds what is not served, or the cache cannot be written.
    """
    try:
        folder = cache_dir / "llm" / f"{(digest or sha256(path))[:16]}-{FORMAT}"
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                logger.info("converting %s, once", path)
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as scratch:
                    new = Path(scratch) / "model"
                    new.mkdir()
                    convert(path, new)
                    os.replace(new, folder)
    except OSError as error:
        raise ModelError(f"{path} cannot be converted into {cache_dir}: {error}") from None
    return folder


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer into an empty folder."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except OSError:
        raise
    except Exception as error:  # the reader checks little: what is damaged fails in many ways
        raise ModelError(f"{path} is not a whole GGUF file: {one_line(error)}") from None
    architecture = values.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ModelError(f"{path}: general.architecture is {architecture!r}; served is {ARCHITECTURE!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(values, tensors, path)
    sizes = LlmConfig.parse(config, path)
    weights = {}
    for name, tensor in tensors.items():
        if name == ROPE_FACTORS:
            continue
        value = _dequantised(tensor, path)
        if name.endswith("attn_q.weight"):
            value = _unpermuted(value, sizes.heads)
        elif name.endswith("attn_k.weight"):
            value = _unpermuted(value, sizes.kv_heads)
        weights[_name(name, path)] = value.contiguous()
    tokenizer, tokenizer_config = build_tokenizer(values, path)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "config.json", config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _config(values: dict[str, Any], tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    """The metadata as a config.json of transformers."""

    def value(key: str) -> Any:
        return values.get(f"{ARCHITECTURE}.{key}")

    if "token_embd.weight" not in tensors:
        raise ModelError(f"{path} lacks token_embd.weight")
    if value("expert_count"):
        raise ModelError(f"{path} is a mixture of {value('expert_count')} experts, which is not served")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": value("block_count"),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": value("attention.key_length") or value("rope.dimension_count"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base"),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
    }
    config = {key: found for key, found in config.items() if found is not None}
    kind = value("rope.scaling.type")
    if kind not in (None, "none"):
        config["rope_scaling"] = {"rope_type": kind, "factor": value("rope.scaling.factor")}
    if ROPE_FACTORS in tensors:
        factors = torch.from_numpy(tensors[ROPE_FACTORS].data.copy())
        config["rope_scaling"] = _llama3(factors, LlmConfig.parse(config, path), path)
    return config


def _llama3(factors: torch.Tensor, sizes: LlmConfig, path: Path) -> dict[str, Any]:
    """Llama 3's scaling as its parameters: the one that it was published with, if the factors [D/2] are those."""
    scaling = Llama3Scaling(float(factors.max()), 1.0, 4.0, 8192)
    slow, plain = (
        torch.atan2(table[1, sizes.head_dim // 2 :], table[1, : sizes.head_dim // 2])  # angles at position 1
        for table in (rope_table(2, sizes.head_dim, sizes.rope_theta, "cpu", choice) for choice in (scaling, None))
    )
    if factors.shape != plain.shape or not torch.allclose(plain / slow, factors.float(), rtol=1e-3):
        raise ModelError(f"{path}: {ROPE_FACTORS} is a scaling of positions other than Llama 3's, which is not served")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _dequantised(tensor: Any, path: Path) -> torch.Tensor:
    import gguf

    try:
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    except NotImplementedError:
        raise ModelError(
            f"{path}: {tensor.name} is quantised as {tensor.tensor_type.name}, which is not served"
        ) from None
    return value.to(HALVES.get(tensor.tensor_type.name, torch.float32))


def _unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as in Llama's published weights: [heads * D, hidden].

    GGUF interleaves each head's two halves, (0, D/2, 1, D/2 + 1, ...), for its own rotary embedding.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _name(name: str, path: Path) -> str:
    """A tensor's name in transformers."""
    layer = LAYER.fullmatch(name)
    known = NAMES.get(layer[2] if layer else name.removesuffix(".weight"))
    if known is None:
        raise ModelError(f"{path} has unknown {name}")
    return f"model.layers.{layer[1]}.{known}.weight" if layer else f"{known}.weight"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
