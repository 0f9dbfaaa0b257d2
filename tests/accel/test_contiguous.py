"""Attention over contiguous slots: the reference and the Triton kernels (interpreted without a GPU) against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from accel.attention import contiguous
from accel.attention.contiguous import contiguous_decode, contiguous_prefill
from tests.accel.naive_attention import (
    DEVICE,
    KINDS,
    TOLERANCE,
    Case,
    Shape,
    case,
    in_slots,
    interpreted_bfloat16,
)
from tests.accel.test_paged import DECODES, PREFILLS


@pytest.fixture(params=[False, True], ids=["reference", "triton"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(contiguous, "use_triton", lambda tensor: request.param)
    with interpreted_bfloat16():
        yield


def check(function: Callable[..., torch.Tensor], c: Case, room: int, *where: torch.Tensor) -> None:
    tensors = [c.q, *in_slots(c, room), *where, c.lengths]
    got = function(*(tensor.to(DEVICE) for tensor in tensors), c.scale).cpu()
    assert got.dtype == c.q.dtype
    torch.testing.assert_close(got.double(), c.expected(), rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype])


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(("shape", "dtype"), [KINDS[0], KINDS[2], KINDS[-2]])
@pytest.mark.parametrize("name", DECODES)
def test_decode_is_attention(name: str, shape: Shape, dtype: torch.dtype) -> None:
    check(contiguous_decode, case(shape, [(1, length) for length in DECODES[name]], dtype), 701)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(("shape", "dtype"), [KINDS[0], KINDS[2], KINDS[-2]])
@pytest.mark.parametrize("name", PREFILLS)
def test_prefill_is_attention(name: str, shape: Shape, dtype: torch.dtype) -> None:
    c = case(shape, PREFILLS[name], dtype)
    check(contiguous_prefill, c, 151, c.starts)
