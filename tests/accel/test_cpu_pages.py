"""Pages of the CPU come and go for real: measured as resident memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from accel.memory.cpu_pages import CpuPages
from accel.memory.page_driver import VirtualMemoryError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="virtual memory on the CPU needs Linux")

PAGE = 64 * 1024


def resident(address: int, nbytes: int) -> int:
    """Bytes of [address, address + nbytes) in physical memory."""
    end = address + nbytes
    total, start, stop = 0, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
        elif first == "Rss:" and start < end and stop > address:
            if address <= start and stop <= end:
                total += int(line.split()[1]) * 1024
            else:  # Linux has made one mapping of this one and its neighbour
                total += counted(max(address, start), min(end, stop))
    return total


def counted(start: int, end: int) -> int:
    """Bytes of [start, end) that have pages, by mincore(2); both multiples of a page."""
    there = (ctypes.c_ubyte * ((end - start) // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(end - start), there) == 0
    return int((np.frombuffer(there, np.uint8) & 1).sum()) * mmap.PAGESIZE


@contextmanager
def reserved(nbytes: int) -> Iterator[tuple[CpuPages, int, torch.Tensor]]:
    driver = CpuPages(PAGE)
    address = driver.reserve(nbytes)
    yield driver, address, driver.tensor(address, nbytes)
    driver.free(address, nbytes)


def test_address_space_costs_nothing_until_pages_are_mapped_and_again_when_they_are_not() -> None:
    size = 1 << 40
    with reserved(size) as (driver, address, memory):
        assert memory.shape == (size,)
        before = resident(address, size)
        assert before < PAGE
        driver.map(address + size // 2, [driver.create() for _ in range(7)])
        assert resident(address, size) - before == 7 * PAGE
        driver.unmap(address + size // 2 + 2 * PAGE)
        assert resident(address, size) - before == 6 * PAGE


def test_a_write_takes_no_more_than_its_page() -> None:
    """Huge pages would bring 2 MiB for it."""
    with reserved(1 << 30) as (driver, address, memory):
        driver.map(address + (1 << 29), [None])
        memory[1 << 29] = 1
        assert resident(address, 1 << 30) <= PAGE + mmap.PAGESIZE


def test_what_was_unmapped_reads_as_zeros_and_neighbours_stay() -> None:
    with reserved(8 * PAGE) as (driver, address, memory):
        driver.map(address, [None] * 3)
        memory[: 3 * PAGE] = 7
        driver.unmap(address + PAGE)
        assert memory.view(8, PAGE).sum(1).tolist() == [7 * PAGE, 0, 7 * PAGE, 0, 0, 0, 0, 0]
        driver.map(address + PAGE, [None])
        assert memory[PAGE : 2 * PAGE].count_nonzero() == 0


def test_tensors_may_outlive_the_reservation() -> None:
    with reserved(2 * PAGE) as (driver, address, memory):
        driver.map(address, [None])
        memory[5] = 1
    assert memory[:6].tolist() == [0, 0, 0, 0, 0, 1]


def test_older_kernels_fill_pages_in_by_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    with reserved(8 * PAGE) as (driver, address, _):
        monkeypatch.setattr(driver, "_try", lambda *args: errno.EINVAL)
        driver.map(address, [None] * 3)
        assert resident(address, 8 * PAGE) == 3 * PAGE


def test_the_kernels_errors_are_told_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with reserved(8 * PAGE) as (driver, address, _):
        advise = driver._try

        def fill_half(address: int, nbytes: int, advice: int) -> int:
            if advice == mmap.MADV_DONTNEED:
                return advise(address, nbytes, advice)
            assert advise(address, nbytes // 2, advice) == 0
            return errno.ENOMEM

        monkeypatch.setattr(driver, "_try", fill_half)
        with pytest.raises(VirtualMemoryError, match="madvise, to fill in 131072 bytes: Cannot allocate memory"):
            driver.map(address, [None] * 2)
        assert resident(address, 8 * PAGE) == 0
        with pytest.raises(VirtualMemoryError, match="madvise, to drop 65536 bytes: Invalid argument"):
            driver.unmap(address + 1)


def test_too_much_address_space_is_refused() -> None:
    with pytest.raises(VirtualMemoryError, match=f"mmap of {1 << 60} bytes of address space"):
        CpuPages(PAGE).reserve(1 << 60)


@pytest.mark.parametrize("page_bytes", [1, mmap.PAGESIZE - 1, mmap.PAGESIZE + 1])
def test_pages_are_whole_pages_of_the_system(page_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"page_bytes: {page_bytes}; allowed: multiples of {mmap.PAGESIZE}"):
        CpuPages(page_bytes)


def test_a_neighbours_memory_is_not_counted() -> None:
    """Linux merges anonymous mappings that touch."""
    with reserved(64 * PAGE) as (_, one, first), reserved(64 * PAGE) as (_, two, second):
        first.fill_(1)
        assert resident(two, 64 * PAGE) == 0
        second[: 3 * PAGE].fill_(1)
        assert resident(two, 64 * PAGE) == 3 * PAGE
        assert resident(one, 64 * PAGE) == 64 * PAGE
