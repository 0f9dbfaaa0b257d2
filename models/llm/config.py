"""Sizes and constants of a Llama-family decoder, as its config.json says them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.kernels.rope import LinearScaling, Llama3Scaling, RopeScaling
from models.errors import ModelError

SERVED = ("llama", "mistral")
ROPE_THETA = 10000.0  # Llama's, for old config files that do not name it


@dataclass(frozen=True, slots=True)
class LlmConfig:
    """What the network is made of."""

    layers: int
    hidden_size: int
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool  # the output layer is the embedding

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return float(self.head_dim**-0.5)

    @classmethod
    def parse(cls, config: Mapping[str, Any], path: Path) -> LlmConfig:
        """Read the contents of a config.json; `path` is for messages.

        Raises:
            ModelError: not a decoder of this family, or a field is missing or out of range.
        """
        kind = config.get("model_type")
        if kind not in SERVED:
            raise ModelError(f"{path}: model_type is {kind!r}; served language models are {', '.join(SERVED)}")
        fields = _Fields(config, path)
        for name, needed in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
            ("sliding_window", None),
            ("partial_rotary_factor", 1.0),
            ("quantization_config", None),
        ):
            fields.must_be(name, needed)
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        kv_heads, head_dim = fields.count("num_key_value_heads", heads), fields.count("head_dim", hidden // heads)
        positions = fields.count("max_position_embeddings")
        if heads % kv_heads:
            raise ModelError(
                f"{path}: num_attention_heads is {heads}, not a multiple of num_key_value_heads, {kv_heads}"
            )
        if head_dim % 2:
            raise ModelError(f"{path}: head_dim is {head_dim}; rotary embedding needs an even one")
        theta, scaling = _rope(fields, positions)
        return cls(
            layers=fields.count("num_hidden_layers"),
            hidden_size=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_size=fields.count("intermediate_size"),
            vocab_size=fields.count("vocab_size"),
            max_positions=positions,
            norm_eps=fields.positive("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def _rope(fields: _Fields, positions: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling: in `rope_parameters`, or in `rope_theta` and `rope_scaling` of older files."""
    rope = fields.group("rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling")
    rope.must_be("partial_rotary_factor", 1.0)
    theta = (rope if "rope_theta" in rope.values else fields).positive("rope_theta", ROPE_THETA)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))  # "type": before transformers 4.43
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(rope.positive("factor"))
    if kind == "llama3":
        scaling = Llama3Scaling(
            rope.positive("factor"),
            rope.positive("low_freq_factor"),
            rope.positive("high_freq_factor"),
            rope.count("original_max_position_embeddings", positions),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise ModelError(
                f"{rope.path}: low_freq_factor is {scaling.low_freq_factor}; it is less than high_freq_factor"
            )
        return theta, scaling
    raise ModelError(f"{rope.path}: rope_type is {kind!r}; served are default, linear, llama3")


@dataclass(frozen=True, slots=True)
class _Fields:
    """A JSON object whose values are checked as they are read."""

    values: Mapping[str, Any]
    path: Path | str

    def group(self, name: str) -> _Fields:
        """An object within this one; an empty one if it is absent or null."""
        value = self.values.get(name) or {}
        if not isinstance(value, Mapping):
            raise ModelError(f"{self.path}: {name} is {value!r}, not an object")
        return _Fields(value, f"{self.path}: {name}")

    def must_be(self, name: str, needed: object) -> None:
        value = self.values.get(name, needed)
        if value != needed:
            raise ModelError(f"{self.path}: {name} is {value!r}; served is {needed!r} only")

    def count(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.path}: {name} is {value!r}, not a positive whole number")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ModelError(f"{self.path}: {name} is {value!r}, not a positive number")
        return float(value)

    def _get(self, name: str, default: object) -> object:
        value = self.values.get(name)  # null is how some files leave a field to its default
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.path} lacks {name}")
        return value
