"""RMSNorm: the reference and the Triton kernel (interpreted here) against float64, with and without the residual."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from accel.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tests.accel.rounding import one_rounding

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
from accel.kernels.rms_norm_triton import add_rms_norm_triton, rms_norm_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 576), (5, 576), (3, 1), (2, 7), (4, 64), (2, 1025), (0, 576)]
NORMS = [rms_norm_reference, rms_norm_triton, rms_norm]
ADD_NORMS = [add_rms_norm_reference, add_rms_norm_triton, add_rms_norm]


def tensors(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, residual = (3 * torch.randn(2, *shape, generator=generator)).to(DEVICE, dtype)
    return x, residual, (1 + torch.randn(shape[1], generator=generator)).to(DEVICE, dtype)


def in_float64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def assert_rounded_once(got: torch.Tensor, expected: torch.Tensor, interpreted: bool) -> None:
    rtol = one_rounding(got.dtype, interpreted)
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_the_norm_is_that_of_float64_rounded_once(
    norm: Callable[..., torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, _, weight = tensors(shape, dtype)
    before = x.clone()
    y = norm(x, weight, 1e-5)
    assert y.dtype == dtype
    assert_rounded_once(y, in_float64(x, weight, 1e-5), INTERPRETED and norm is rms_norm_triton)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("add_norm", ADD_NORMS)
def test_the_residual_is_the_rounded_sum_and_its_norm_comes_back(
    add_norm: Callable[..., torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, residual, weight = tensors(shape, dtype)
    total = x.double() + residual.double()
    y = add_norm(x, residual, weight, 1e-6)
    interpreted = INTERPRETED and add_norm is add_rms_norm_triton
    assert_rounded_once(residual, total, interpreted)
    assert_rounded_once(y, in_float64(residual, weight, 1e-6), interpreted)


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_of_zeros_stays_zero(norm: Callable[..., torch.Tensor]) -> None:
    x, _, weight = tensors((3, 17), torch.float32)
    x[1] = 0
    y = norm(x, weight, 1e-5)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert_rounded_once(y, in_float64(x, weight, 1e-5), interpreted=False)


def test_rows_may_be_a_slice_of_wider_ones() -> None:
    x, residual, weight = tensors((4, 40), torch.float32)
    expected = rms_norm_reference(x[:, 3:20].contiguous(), weight[:17], 1e-5)
    torch.testing.assert_close(rms_norm_triton(x[:, 3:20], weight[:17], 1e-5), expected)
    outside = residual.clone()
    total = x[:, 3:20] + residual[:, 3:20]
    add_rms_norm_triton(x[:, 3:20], residual[:, 3:20], weight[:17], 1e-5)
    outside[:, 3:20] = total
    assert torch.equal(residual, outside)
