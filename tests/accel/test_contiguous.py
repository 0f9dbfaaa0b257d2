"""Attention over contiguous slots: the reference and the Triton kernels (interpreted here) against float64."""

from __future__ import annotations

import pytest
import torch

from accel.attention.contiguous import contiguous_decode_reference, contiguous_prefill_reference
from tests.accel.naive_attention import DTYPES, SHAPES, TOLERANCE, Shape, case, in_slots
from tests.accel.test_paged import DECODES, PREFILLS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", DECODES)
def test_decode_is_attention(lengths: list[int], shape: Shape, dtype: torch.dtype) -> None:
    c = case(shape, [(1, length) for length in lengths], dtype)
    keys, values, slots = in_slots(c, 701)
    got = contiguous_decode_reference(c.q, keys, values, slots, c.lengths, c.scale)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), c.expected(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spans", PREFILLS)
def test_prefill_is_attention(spans: list[tuple[int, int]], shape: Shape, dtype: torch.dtype) -> None:
    c = case(shape, spans, dtype)
    keys, values, slots = in_slots(c, 151)
    got = contiguous_prefill_reference(c.q, keys, values, slots, c.starts, c.lengths, c.scale)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), c.expected(), rtol=0, atol=TOLERANCE[dtype])
