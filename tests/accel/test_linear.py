"""Products with packed weights against plain ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from accel.kernels.linear import linear, packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(96, 64), (33, 7), (1, 5), (257, 576)])
@pytest.mark.parametrize("rows", [0, 1, 2, 65, 400])
def test_a_packed_weight_is_the_weight(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    x = torch.randn(rows, shape[1], generator=generator).to(DEVICE, dtype)
    got = linear(x, packed(weight))
    assert got.dtype == dtype
    expected = functional.linear(x.double(), weight.double())
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * shape[1] ** 0.5)
    torch.testing.assert_close(linear(x, weight), functional.linear(x, weight), rtol=0, atol=0)


def test_float32_is_packed_on_the_cpu_where_onednn_is() -> None:
    weight = torch.ones(8, 8)
    assert packed(weight).is_mkldnn == torch.backends.mkldnn.is_available()
    assert packed(weight.half()).data_ptr() != 0  # left as it is, for torch's own product


def test_rows_of_a_larger_tensor_are_taken() -> None:
    x, weight = torch.randn(6, 3, 64), torch.randn(32, 64)
    torch.testing.assert_close(linear(x[::2, 1], packed(weight)), functional.linear(x[::2, 1], weight))
