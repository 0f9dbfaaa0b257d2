"""Attention over pages: the reference and the Triton kernels (interpreted here) against float64."""

from __future__ import annotations

import pytest
import torch

from accel.attention.paged import paged_decode_reference, paged_prefill_reference
from tests.accel.naive_attention import DTYPES, SHAPES, TOLERANCE, Shape, case, in_pages

DECODES = [[1], [16], [1, 5, 16, 17, 33], [0, 40, 0, 3], [300, 2, 290, 31, 700], [64] * 9]
PREFILLS = [
    [(1, 1)],
    [(7, 7), (16, 16), (33, 33)],
    [(5, 21), (1, 40), (17, 18)],
    [(0, 12), (3, 3), (0, 0), (20, 90)],
    [(70, 70), (65, 150)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", DECODES)
def test_decode_is_attention(lengths: list[int], shape: Shape, dtype: torch.dtype) -> None:
    c = case(shape, [(1, length) for length in lengths], dtype)
    keys, values, tables = in_pages(c, 16)
    got = paged_decode_reference(c.q, keys, values, tables, c.lengths, c.scale)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), c.expected(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spans", PREFILLS)
def test_prefill_is_attention(spans: list[tuple[int, int]], shape: Shape, dtype: torch.dtype) -> None:
    c = case(shape, spans, dtype)
    keys, values, tables = in_pages(c, 16)
    got = paged_prefill_reference(c.q, keys, values, tables, c.starts, c.lengths, c.scale)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), c.expected(), rtol=0, atol=TOLERANCE[dtype])
