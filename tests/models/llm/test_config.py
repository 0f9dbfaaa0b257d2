"""What a config.json must say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accel.kernels.rope import LinearScaling, Llama3Scaling
from models.errors import ModelError
from models.llm.config import LlmConfig

PATH = Path("model/config.json")
SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


def parse(**changes: Any) -> LlmConfig:
    return LlmConfig.parse({key: value for key, value in (SMOLLM2 | changes).items() if value != "absent"}, PATH)


def test_sizes_are_read() -> None:
    config = parse()
    assert (config.layers, config.hidden_size, config.heads, config.kv_heads, config.head_dim) == (30, 576, 9, 3, 64)
    assert (config.ffn_size, config.vocab_size, config.max_positions) == (1536, 49152, 8192)
    assert (config.rope_theta, config.rope_scaling, config.tied_embeddings) == (100000.0, None, True)
    assert config.scale == 0.125


def test_what_old_files_leave_out_has_a_default() -> None:
    config = parse(num_key_value_heads="absent", rope_theta=None, head_dim=None, tie_word_embeddings="absent")
    assert (config.kv_heads, config.head_dim, config.rope_theta, config.tied_embeddings) == (9, 64, 10000.0, False)


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 100000.0, LinearScaling(2.0)),
        ({"rope_scaling": LLAMA3}, 100000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7}, "rope_theta": "absent"}, 7.0, None),
    ],
)
def test_positions_are_read_from_old_and_new_files(changes: dict[str, Any], theta: float, scaling: object) -> None:
    config = parse(**changes)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; served language models are llama, mistral"),
        ({"model_type": "absent"}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; served is 'silu' only"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"vocab_size": "absent"}, "model/config.json lacks vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a positive whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 57.5}, "hidden_size is 57.5"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 9, not a multiple of num_key_value_heads, 4"),
        ({"head_dim": 63}, "head_dim is 63"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_type is 'yarn'; served are default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor is 4.0; it is less than high_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_is_not_served_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as told:
        parse(**changes)
    assert message in str(told.value)
    assert "\n" not in str(told.value)
