"""The fused update: what it does, and the Triton kernel (interpreted here) against the torch reference."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from accel.kernels.sampler_step import sampler_step, sampler_step_reference
from accel.samplers.noise import INITIAL_ROW, gaussian

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
from accel.kernels.sampler_step_triton import sampler_step_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(4, 8, 8), (3, 5, 7), (1, 1, 1), (4, 32, 33), (2, 1, 1023)]


def batch(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Four rows in permuted slots of six: one without noise, one without history, one with neither."""
    generator = torch.Generator().manual_seed(1)
    coefficients = torch.randn(4, 4, generator=generator)
    coefficients[0, 3] = coefficients[1, 2] = coefficients[3, 2] = coefficients[3, 3] = 0
    tensors = {
        "x": torch.randn(6, *shape, generator=generator),
        "previous": torch.randn(6, *shape, generator=generator),
        "slots": torch.tensor([5, 0, 3, 2]),
        "denoised": torch.randn(4, *shape, generator=generator).to(dtype),
        "coefficients": coefficients,
        "seeds": torch.tensor([0, 1, 2**32 - 1, 7]),
        "rows": torch.tensor([0, 49, 3, 199]),
        "finite": torch.ones(6, dtype=torch.bool),
    }
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def run(step: Callable[..., None], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    written = {name: tensor.clone() for name, tensor in tensors.items()}
    step(**written)
    return written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    before = batch(shape, dtype)
    expected, got = run(sampler_step_reference, before), run(sampler_step_triton, before)
    torch.testing.assert_close(got["x"], expected["x"], rtol=2e-6, atol=2e-6)
    for name in before:
        if name != "x":
            assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("step", [sampler_step_reference, sampler_step_triton, sampler_step])
def test_the_update_is_the_plan_row(step: Callable[..., None]) -> None:
    before = batch((3, 5, 7))
    after = run(step, before)
    noise = gaussian(before["seeds"], before["rows"], (3, 5, 7), DEVICE)
    for i, slot in enumerate(before["slots"]):
        a, b, c, s = before["coefficients"][i]
        expected = a * before["x"][slot] + b * before["denoised"][i] + c * before["previous"][slot] + s * noise[i]
        torch.testing.assert_close(after["x"][slot], expected, rtol=2e-6, atol=2e-6)
        assert torch.equal(after["previous"][slot], before["denoised"][i])
    for slot in (1, 4):
        assert torch.equal(after["x"][slot], before["x"][slot])
        assert torch.equal(after["previous"][slot], before["previous"][slot])
    assert after["finite"].all()


@pytest.mark.parametrize("step", [sampler_step_reference, sampler_step_triton])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("element", [0, -1])
def test_only_the_row_with_a_non_finite_element_is_marked(
    step: Callable[..., None], value: float, element: int
) -> None:
    tensors = batch((2, 40, 41))
    tensors["denoised"][2].view(-1)[element] = value
    tensors["finite"][1] = False  # another picture's mark stays
    after = run(step, tensors)
    assert after["finite"].tolist() == [True, False, True, False, True, True]
    assert after["x"][[5, 0, 2]].isfinite().all()


@pytest.mark.parametrize("step", [sampler_step_reference, sampler_step_triton])
def test_a_mark_is_never_taken_back(step: Callable[..., None]) -> None:
    tensors = batch((1, 2, 2))
    tensors["finite"][5] = False
    assert not run(step, tensors)["finite"][5]


@pytest.mark.parametrize("step", [sampler_step_reference, sampler_step_triton])
def test_what_an_earlier_owner_left_does_no_harm(step: Callable[..., None]) -> None:
    """Rows 1 and 3 have c = 0."""
    tensors = batch((4, 8, 8))
    tensors["previous"][[0, 2]] = torch.nan
    after = run(step, tensors)
    assert after["finite"].all()
    assert after["x"].isfinite().all()


@pytest.mark.parametrize("step", [sampler_step_reference, sampler_step_triton])
def test_a_picture_starts_with_noise_alone(step: Callable[..., None]) -> None:
    tensors = batch((4, 8, 8))
    tensors["x"].fill_(torch.nan)
    tensors["previous"].fill_(torch.inf)
    tensors["denoised"].zero_()
    tensors["rows"].fill_(INITIAL_ROW)
    tensors["coefficients"] = torch.tensor([[0.0, 0.0, 0.0, 0.5]] * 4, device=DEVICE)
    after = run(step, tensors)
    initial = gaussian(tensors["seeds"], INITIAL_ROW, (4, 8, 8), DEVICE)
    torch.testing.assert_close(after["x"][tensors["slots"]], 0.5 * initial, rtol=2e-6, atol=2e-6)
    assert after["finite"].all()
