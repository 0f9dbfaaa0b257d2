"""SwiGLU: the reference and the Triton kernel (interpreted here) against float64."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from accel.kernels.swiglu import swiglu, swiglu_reference
from tests.accel.rounding import one_rounding

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
from accel.kernels.swiglu_triton import swiglu_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1536), (5, 1536), (3, 1), (2, 7), (2, 1025), (0, 64)]


def projection(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(shape[0], 2 * shape[1], generator=generator)).to(DEVICE, dtype)


def in_float64(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gated", "roundings"), [(swiglu_triton, 1), (swiglu_reference, 2), (swiglu, 2)])
def test_it_is_that_of_float64_but_for_rounding(
    gated: Callable[[torch.Tensor], torch.Tensor], roundings: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    gate_up = projection(shape, dtype)
    before = gate_up.clone()
    y = gated(gate_up)
    assert y.dtype == dtype
    assert y.shape == shape
    rtol = roundings * one_rounding(dtype, DEVICE == "cpu" and gated is swiglu_triton)
    torch.testing.assert_close(y.double(), in_float64(gate_up), rtol=rtol, atol=1e-7)
    assert torch.equal(gate_up, before)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("gated", [swiglu_reference, swiglu_triton])
def test_far_gates_are_shut_or_open(gated: Callable[[torch.Tensor], torch.Tensor]) -> None:
    y = gated(torch.tensor([[-200.0, 200.0, 0.0, 2.0, 3.0, 4.0]], device=DEVICE))
    assert y.tolist() == [[0.0, 600.0, 0.0]]


def test_rows_may_be_a_slice_of_wider_ones() -> None:
    wide = projection((4, 20), torch.float32)
    torch.testing.assert_close(swiglu_triton(wide[:, 3:17]), swiglu_reference(wide[:, 3:17].contiguous()))
