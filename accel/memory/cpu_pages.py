"""Virtual memory of the CPU: an anonymous mapping whose pages are filled in and dropped through madvise(2)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Sequence

import torch

from accel.memory.page_driver import Page, VirtualMemoryError

DEFAULT_PAGE_BYTES = 256 * 1024

_MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE is there from Python 3.13 on
_MADV_POPULATE_WRITE = 23  # Linux 5.14


class CpuPages:
    """A `PageDriver`. Pages are counted by the caller; physical memory comes and goes as they are mapped.

    What is not mapped reads as zeros, and a stray write there takes memory that nobody counts: a GPU would fault.
    """

    def __init__(self, page_bytes: int = DEFAULT_PAGE_BYTES) -> None:
        if sys.platform != "linux":
            raise VirtualMemoryError(f"virtual memory on the CPU needs Linux; this is {sys.platform}")
        if page_bytes < mmap.PAGESIZE or page_bytes % mmap.PAGESIZE:
            raise ValueError(f"page_bytes: {page_bytes}; allowed: multiples of {mmap.PAGESIZE}")
        self.page_bytes = page_bytes
        self._reservations: dict[int, torch.Tensor] = {}
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise  # mmap.madvise would hold the interpreter's lock
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def reserve(self, nbytes: int) -> int:
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            memory = torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)
        except (OSError, OverflowError) as error:
            raise VirtualMemoryError(f"mmap of {nbytes} bytes of address space: {error}") from error
        address = memory.data_ptr()
        self._reservations[address] = memory
        self._try(address, nbytes, mmap.MADV_NOHUGEPAGE)  # a touch would bring 2 MiB; refused where none ever are huge
        return address

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return self._reservations[address][:nbytes]

    def create(self) -> Page:
        return None

    def map(self, address: int, pages: Sequence[Page]) -> None:
        nbytes = len(pages) * self.page_bytes
        code = self._try(address, nbytes, _MADV_POPULATE_WRITE)
        if code == errno.EINVAL:  # an older kernel
            ctypes.memset(address, 0, nbytes)
        elif code:
            self._try(address, nbytes, mmap.MADV_DONTNEED)
            raise VirtualMemoryError(f"madvise, to fill in {nbytes} bytes: {os.strerror(code)}")

    def unmap(self, address: int) -> None:
        if code := self._try(address, self.page_bytes, mmap.MADV_DONTNEED):
            raise VirtualMemoryError(f"madvise, to drop {self.page_bytes} bytes: {os.strerror(code)}")

    def release(self, page: Page) -> None:
        pass

    def free(self, address: int, nbytes: int) -> None:
        """The addresses themselves go when the last tensor over them does."""
        del self._reservations[address]

    def fence(self) -> None:
        return None

    def enter_thread(self) -> None:
        pass

    def _try(self, address: int, nbytes: int, advice: int) -> int:
        """madvise(2): 0, or the number of its error."""
        return ctypes.get_errno() if self._madvise(address, nbytes, advice) else 0
