"""RoPE: the table and the turn against transformers' Llama and float64, the Triton kernel (interpreted here) too."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from accel.kernels.rope import LinearScaling, Llama3Scaling, RopeScaling, rope, rope_reference, rope_table
from tests.accel.rounding import one_rounding

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
from accel.kernels.rope_triton import rope_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(9, 3, 64), (1, 1, 2), (5, 2, 6), (4, 4, 128), (6, 1, 80)]
TURNS = [rope_reference, rope_triton, rope]
SCALINGS: list[RopeScaling | None] = [None, LinearScaling(2.5), Llama3Scaling(32.0, 1.0, 4.0, 8192)]


def transformers_angles(dim: int, theta: float, scaling: RopeScaling | None, count: int) -> torch.Tensor:
    """[count, dim]: cosines and sines, half of each since transformers repeats them."""
    kinds = {LinearScaling: "linear", Llama3Scaling: "llama3", type(None): "default"}
    parameters = {"rope_type": kinds[type(scaling)], "rope_theta": theta, **(vars(scaling) if scaling else {})}
    config = LlamaConfig(
        hidden_size=2 * dim, num_attention_heads=2, rope_parameters=parameters, max_position_embeddings=9000
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(count)[None])
    return torch.cat((cos[0, :, : dim // 2], sin[0, :, : dim // 2]), dim=-1)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("dim", "theta"), [(64, 100000.0), (6, 10000.0), (128, 500000.0)])
def test_the_table_is_that_of_transformers(dim: int, theta: float, scaling: RopeScaling | None) -> None:
    table = rope_table(9000, dim, theta, DEVICE, scaling)
    assert table.shape == (9000, dim)
    assert table.dtype == torch.float32
    expected = transformers_angles(dim, theta, scaling, 9000)
    # Llama 3's mixed frequencies are rounded in another order: a unit in the last place of an angle of up to 30.
    atol = 1e-5 if isinstance(scaling, Llama3Scaling) else 0
    torch.testing.assert_close(table.cpu(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dim", [0, 7, -2])
def test_a_head_that_cannot_be_paired_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim is {dim}: .*even"):
        rope_table(8, dim, 10000.0, "cpu")


def fused(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, (Hq + 2 Hkv) D] as a fused projection leaves it, and the positions of its tokens, out of order."""
    query_heads, kv_heads, dim = heads
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(tokens, (query_heads + 2 * kv_heads) * dim, generator=generator).to(DEVICE, dtype)
    return rows, torch.randint(0, 300, (tokens,), generator=generator).to(DEVICE)


def parts(rows: torch.Tensor, heads: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    query_heads, kv_heads, dim = heads
    return rows.view(len(rows), query_heads + 2 * kv_heads, dim).split((query_heads, kv_heads, kv_heads), dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("turn", TURNS)
def test_queries_and_keys_turn_in_place_as_in_float64(
    turn: Callable[..., None], heads: tuple[int, int, int], tokens: int, dtype: torch.dtype
) -> None:
    rows, positions = fused(tokens, heads, dtype)
    table = rope_table(300, heads[2], 10000.0, DEVICE)
    before = parts(rows.clone(), heads)
    q, k, v = parts(rows, heads)
    turn(q, k, table, positions)
    cos, sin = table.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    for got, x in ((q, before[0]), (k, before[1])):
        first, second = x.double().chunk(2, dim=-1)
        expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        rtol = one_rounding(dtype, DEVICE == "cpu" and turn is rope_triton)
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-6)
    assert torch.equal(v, before[2])


@pytest.mark.parametrize("turn", TURNS)
def test_the_turn_is_that_of_transformers(turn: Callable[..., None]) -> None:
    heads = (9, 3, 64)
    rows, positions = fused(7, heads, torch.float32)
    q, k, _ = parts(rows.clone(), heads)
    turn(q, k, rope_table(300, 64, 100000.0, DEVICE), positions)
    angles = transformers_angles(64, 100000.0, None, 300).to(DEVICE)[positions].chunk(2, dim=-1)
    cos, sin = (torch.cat((half, half), dim=-1)[None] for half in angles)
    before = [x.transpose(0, 1)[None] for x in parts(rows, heads)]
    expected = apply_rotary_pos_emb(before[0], before[1], cos, sin)
    torch.testing.assert_close(q, expected[0][0].transpose(0, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k, expected[1][0].transpose(0, 1), rtol=1e-6, atol=1e-6)
