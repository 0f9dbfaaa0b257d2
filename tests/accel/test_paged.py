"""Attention over pages: the reference and the Triton kernels (interpreted where there is no GPU) against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from accel.attention.paged import paged_decode_reference, paged_prefill_reference
from tests.accel.naive_attention import (
    DEVICE,
    KINDS,
    TOLERANCE,
    Case,
    Shape,
    case,
    in_pages,
    interpreted_bfloat16,
)

from accel.attention.paged_triton import paged_decode_triton, paged_prefill_triton  # isort: skip - after DEVICE

DECODES = {
    "one": [1],
    "page": [16],
    "odd": [1, 5, 16, 17, 33],
    "padded rows": [0, 40, 0, 3],
    "long": [300, 2, 290, 31, 700],
    "many": [64] * 9,
}
# (new tokens, tokens of context) of each sequence
PREFILLS = {
    "one": [(1, 1)],
    "whole": [(7, 7), (16, 16), (33, 33)],
    "prefix": [(5, 21), (1, 40), (17, 18)],
    "none new": [(0, 12), (3, 3), (0, 0), (20, 90)],
    "long": [(70, 70), (65, 150)],
}


@pytest.fixture(scope="module", autouse=True)
def _bfloat16() -> Iterator[None]:
    with interpreted_bfloat16():
        yield


def decode(function: Callable[..., torch.Tensor], c: Case, page_size: int = 16) -> torch.Tensor:
    tensors = [c.q, *in_pages(c, page_size), c.lengths]
    return function(*(tensor.to(DEVICE) for tensor in tensors), c.scale).cpu()


def prefill(function: Callable[..., torch.Tensor], c: Case, page_size: int = 16) -> torch.Tensor:
    tensors = [c.q, *in_pages(c, page_size), c.starts, c.lengths]
    return function(*(tensor.to(DEVICE) for tensor in tensors), c.scale).cpu()


def assert_is_attention(got: torch.Tensor, c: Case) -> None:
    assert got.dtype == c.q.dtype
    torch.testing.assert_close(got.double(), c.expected(), rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype])


@pytest.mark.parametrize("function", [paged_decode_reference, paged_decode_triton])
@pytest.mark.parametrize(("shape", "dtype"), KINDS)
@pytest.mark.parametrize("name", DECODES)
def test_decode_is_attention(
    name: str, shape: Shape, dtype: torch.dtype, function: Callable[..., torch.Tensor]
) -> None:
    c = case(shape, [(1, length) for length in DECODES[name]], dtype)
    assert_is_attention(decode(function, c), c)


@pytest.mark.parametrize("function", [paged_prefill_reference, paged_prefill_triton])
@pytest.mark.parametrize(("shape", "dtype"), KINDS)
@pytest.mark.parametrize("name", PREFILLS)
def test_prefill_is_attention(
    name: str, shape: Shape, dtype: torch.dtype, function: Callable[..., torch.Tensor]
) -> None:
    c = case(shape, PREFILLS[name], dtype)
    assert_is_attention(prefill(function, c), c)


@pytest.mark.parametrize("page_size", [1, 8, 20, 64])
def test_pages_may_be_of_any_size(page_size: int) -> None:
    c = case(Shape(9, 3, 64), [(1, 45), (1, 130)], torch.float32)
    for function in (paged_decode_reference, paged_decode_triton):
        assert_is_attention(decode(function, c, page_size), c)
    c = case(Shape(9, 3, 64), [(45, 130), (3, 3)], torch.float32)
    for function in (paged_prefill_reference, paged_prefill_triton):
        assert_is_attention(prefill(function, c, page_size), c)
