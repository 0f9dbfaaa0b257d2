"""Tensors over foreign memory share it, in every dtype."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

from accel.memory.raw_tensor import tensor_at

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_shares_the_memory_in_any_dtype_and_shape(dtype: torch.dtype) -> None:
    memory = (ctypes.c_uint8 * 96)()
    raw = tensor_at(ctypes.addressof(memory), 96, CPU)
    assert (raw.dtype, raw.shape, raw.data_ptr()) == (torch.uint8, (96,), ctypes.addressof(memory))
    view = raw.view(dtype).view(2, -1, 3)
    view[1, 0] = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    expected = torch.zeros(96 // dtype.itemsize, dtype=dtype).view(2, -1, 3)
    expected[1, 0] = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    assert bytes(memory) == bytes(expected.view(torch.uint8).flatten().tolist())


def test_views_may_die_in_any_order_and_the_memory_stays() -> None:
    memory = (ctypes.c_uint8 * 8)(*range(8))
    raw = tensor_at(ctypes.addressof(memory), 8, CPU)
    view = raw[2:5]
    del raw
    gc.collect()
    assert view.tolist() == [2, 3, 4]
    del view
    gc.collect()
    assert list(memory) == list(range(8))


def test_addresses_with_nothing_mapped_are_no_obstacle() -> None:
    assert tensor_at(1 << 40, 1 << 36, CPU).view(torch.bfloat16).view(4, -1)[3].data_ptr() == (1 << 40) + (3 << 34)
