"""The split of one memory budget."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.memory.budget import DeviceMemory, Needs, device_memory, split

GIB = 2**30
NEEDS = Needs(weights=2 * GIB, latents=GIB, working=GIB)


def test_pages_get_what_is_left_of_the_fraction() -> None:
    budget = split(DeviceMemory(16 * GIB, 15 * GIB), 0.5, NEEDS, page_bytes=GIB, least=1, most=100)
    assert (budget.kv_pages, budget.kv, budget.total) == (4, 4 * GIB, 8 * GIB)


def test_memory_that_others_hold_is_not_given_out() -> None:
    assert split(DeviceMemory(16 * GIB, 5 * GIB), 0.9, NEEDS, page_bytes=GIB, least=1, most=100).kv_pages == 1


def test_pages_that_nobody_could_use_are_not_taken() -> None:
    assert split(DeviceMemory(16 * GIB, 16 * GIB), 1.0, NEEDS, page_bytes=GIB, least=1, most=3).kv_pages == 3


def test_too_small_a_fraction_is_refused_with_one_that_would_do() -> None:
    memory = DeviceMemory(16 * GIB, 16 * GIB)
    with pytest.raises(ValueError, match=r"gpu_memory_fraction: 0\.3 of 16\.00 GiB.*allowed: at least") as refused:
        split(memory, 0.3, NEEDS, page_bytes=GIB, least=2, most=8)
    told = re.search(r"at least ([0-9.]+)", str(refused.value))
    assert told is not None
    assert split(memory, float(told[1]), NEEDS, page_bytes=GIB, least=2, most=8).kv_pages == 2


def test_a_device_too_full_for_any_fraction_is_told_so() -> None:
    with pytest.raises(ValueError, match="a device with more free memory"):
        split(DeviceMemory(16 * GIB, 4 * GIB), 0.9, NEEDS, page_bytes=GIB, least=1, most=8)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_the_fraction_has_a_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="allowed: above 0, at most 1"):
        split(DeviceMemory(GIB, GIB), fraction, Needs(), page_bytes=1, least=1, most=1)


@given(
    st.integers(1, 10**6),
    st.integers(0, 10**6),
    st.floats(0.01, 1.0),
    st.tuples(*[st.integers(0, 10**5)] * 3),
    st.integers(1, 1000),
)
def test_a_split_never_exceeds_the_fraction_nor_what_is_free(
    total: int, free: int, fraction: float, needs: tuple[int, int, int], page_bytes: int
) -> None:
    memory = DeviceMemory(total, min(free, total))
    try:
        budget = split(memory, fraction, Needs(*needs), page_bytes, least=1, most=10**6)
    except ValueError:
        assert sum(needs) + page_bytes > min(int(fraction * total), memory.free)
    else:
        assert budget.total <= min(fraction * total, memory.free)
        assert budget.total + page_bytes > min(int(fraction * total), memory.free) or budget.kv_pages == 10**6


def test_the_machine_has_memory() -> None:
    memory = device_memory(torch.device("cpu"))
    assert 0 < memory.free <= memory.total
