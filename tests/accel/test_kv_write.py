"""The KV write: every new row in its place, nothing else touched, over pages and over virtually contiguous keys."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from accel.kernels.kv_write import kv_write, kv_write_reference, rows_of

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
from accel.kernels.kv_write_triton import kv_write_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WRITES = [kv_write_reference, kv_write_triton, kv_write]
HEADS = [(3, 64), (1, 1), (5, 7), (4, 128)]

Cache = tuple[torch.Tensor, torch.Tensor]


def paged(heads: int, dim: int, dtype: torch.dtype) -> Cache:
    """Layer 1 of 2 of six pages of four tokens, keys and values in one allocation."""
    memory = torch.randn(2, 2, 6, 4, heads, dim, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    return memory[0, 1], memory[1, 1]


def sliced(heads: int, dim: int, dtype: torch.dtype) -> Cache:
    """Layer 1 of 3 of four sequences of six tokens; a token's layers lie side by side."""
    memory = torch.randn(2, 4, 6, 3, heads, dim, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    return memory[0, :, :, 1], memory[1, :, :, 1]


def new_rows(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Cache:
    """Slices of a fused projection whose queries are as many as the keys and values together."""
    fused = torch.randn(tokens, 4 * heads * dim, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    k, v = fused[:, 2 * heads * dim :].view(tokens, 2, heads, dim).unbind(1)
    return k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), HEADS)
@pytest.mark.parametrize("layout", [paged, sliced])
@pytest.mark.parametrize("write", WRITES)
def test_rows_land_in_their_slots_and_nowhere_else(
    write: Callable[..., None], layout: Callable[..., Cache], heads: int, dim: int, dtype: torch.dtype
) -> None:
    keys, values = layout(heads, dim, dtype)
    k, v = new_rows(5, heads, dim, dtype)
    slots = torch.tensor([23, -1, 0, 7, -5], device=DEVICE)
    expected = []
    for cache, rows in ((keys, k), (values, v)):
        after = cache.reshape(-1, heads, dim).clone()
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                after[slot] = rows[row]
        expected.append(after)
    others = keys._base.clone()
    write(k, v, rows_of(keys), rows_of(values), slots)
    assert torch.equal(rows_of(keys), expected[0])
    assert torch.equal(rows_of(values), expected[1])
    rows_of(keys)[:], rows_of(values)[:] = 0, 0
    rows_of(others.as_strided(keys.shape, keys.stride(), keys.storage_offset()))[:] = 0
    rows_of(others.as_strided(values.shape, values.stride(), values.storage_offset()))[:] = 0
    assert torch.equal(keys._base, others)  # the other layers


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("slots", [[], [-1, -1, -1]])
def test_nothing_to_write_writes_nothing(write: Callable[..., None], slots: list[int]) -> None:
    keys, values = paged(3, 8, torch.float32)
    before = keys.clone(), values.clone()
    write(
        *new_rows(len(slots), 3, 8, torch.float32),
        rows_of(keys),
        rows_of(values),
        torch.tensor(slots, dtype=torch.int64, device=DEVICE),
    )
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def test_the_dispatcher_takes_pages_as_they_are() -> None:
    keys, values = paged(3, 8, torch.float32)
    k, v = new_rows(1, 3, 8, torch.float32)
    kv_write(k, v, keys, values, torch.tensor([9], device=DEVICE))
    assert torch.equal(keys[2, 1], k[0])
    assert torch.equal(values[2, 1], v[0])


def test_leading_dimensions_that_do_not_flatten_are_refused() -> None:
    keys = torch.zeros(4, 6, 3, 8).transpose(0, 1)
    with pytest.raises(RuntimeError, match="view"):
        kv_write(*new_rows(1, 3, 8, torch.float32), keys, keys, torch.tensor([0]))
