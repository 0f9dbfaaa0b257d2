"""Devices whose memory is only counted: a page driver, and cuda.bindings.driver below ours. Both watch the rules."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from accel.memory.page_driver import VirtualMemoryError

PAGE = 4096
BASE = 1 << 40


class FakeFence:
    """Passed when it is waited for, or when a test says so."""

    def __init__(self, passed: bool = False) -> None:
        self.passed = passed
        self.waits = 0

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.waits += 1
        self.passed = True


class FakePages:
    """A `PageDriver`. What a real one would not survive is noted in `broken`, also if the caller swallows the error."""

    page_bytes = PAGE

    def __init__(self, capacity: int = 1_000_000) -> None:
        self.capacity = capacity  # pages that `create` gives
        self.created: set[int] = set()
        self.mapped: dict[int, int] = {}  # page by address
        self.reserved: dict[int, int] = {}  # bytes by address
        self.broken: list[str] = []
        self.calls: list[tuple[str, int, int]] = []  # (name, address, pages) of map and unmap, in order
        self.failing: set[str] = set()  # names of methods that fail from now on
        self.fences: list[FakeFence | None] = []  # handed out, latest last
        self.fenced = False
        self.seconds = 0.0  # that map takes
        self.threads: set[str] = set()  # that called map
        self._busy = threading.Lock()

    def reserve(self, nbytes: int) -> int:
        self._may("reserve")
        address = BASE + sum(self.reserved.values())
        self.reserved[address] = nbytes
        return address

    def create(self) -> int:
        self._may("create")
        if len(self.created) == self.capacity:
            raise VirtualMemoryError("create: out of memory")
        page = max(self.created, default=0) + 1
        self.created.add(page)
        return page

    def map(self, address: int, pages: Sequence[int]) -> None:
        with self._alone("map"):
            self._may("map")
            time.sleep(self.seconds)
            self.threads.add(threading.current_thread().name)
            for i, page in enumerate(pages):
                here = address + i * PAGE
                self._rule(here % PAGE == 0, f"{here}: not a page's address")
                self._rule(any(a <= here < a + n for a, n in self.reserved.items()), f"{here}: not reserved")
                self._rule(here not in self.mapped, f"{here}: mapped twice")
                self._rule(page in self.created, f"page {page}: never created")
                self._rule(page not in self.mapped.values(), f"page {page}: mapped in two places")
                self.mapped[here] = page
            self.calls.append(("map", address, len(pages)))

    def unmap(self, address: int) -> None:
        with self._alone("unmap"):
            self._may("unmap")
            self._rule(address in self.mapped, f"{address}: unmapped without being mapped")
            self.mapped.pop(address, None)
            self.calls.append(("unmap", address, 1))

    def release(self, page: int) -> None:
        self._may("release")
        self._rule(page in self.created, f"page {page}: released twice")
        self._rule(page not in self.mapped.values(), f"page {page}: released while mapped")
        self.created.discard(page)

    def free(self, address: int, nbytes: int) -> None:
        self._may("free")
        self._rule(self.reserved.pop(address, None) == nbytes, f"{address}: not a reservation of {nbytes}")
        self._rule(not self.mapped, "address space freed with pages in it")

    def fence(self) -> FakeFence | None:
        self.fences.append(FakeFence() if self.fenced else None)
        return self.fences[-1]

    def enter_thread(self) -> None:
        self.threads.add("entered " + threading.current_thread().name)

    def _alone(self, name: str) -> threading.Lock:
        self._rule(not self._busy.locked(), f"{name} while another call was running")
        return self._busy

    def _may(self, name: str) -> None:
        if name in self.failing:
            raise VirtualMemoryError(f"{name}: told to fail")

    def _rule(self, kept: bool, broken: str) -> None:
        if not kept:
            self.broken.append(broken)


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2


class FakeCuda:
    """What of cuda.bindings.driver is used, with its tuples (code, value); to breach its rules is an error."""

    CUresult = Result
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=102)

    def __init__(self, granularity: int = PAGE, capacity: int = 1_000_000, supported: int = 1) -> None:
        self.granularity, self.capacity, self.supported = granularity, capacity, supported
        self.device: int | None = None
        self.handles: dict[int, int] = {}  # bytes by handle
        self.mapped: dict[int, int] = {}  # handle by address
        self.accessible: set[int] = set()
        self.reserved: dict[int, int] = {}
        self.calls: list[str] = []
        self.fail_at: dict[str, int] = {}  # calls of a name that still succeed before one fails

    def CUmemAllocationProp(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    def CUmemAccessDesc(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(location=None, flags=None)

    def cuInit(self, flags: int) -> tuple:  # noqa: N802
        return self._answer("cuInit", flags == 0)

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> tuple:  # noqa: N802
        return self._answer("cuThreadExchangeStreamCaptureMode", mode == 2, 0)

    def cuDeviceGet(self, ordinal: int) -> tuple:  # noqa: N802
        return self._answer("cuDeviceGet", True, ordinal)

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple:  # noqa: N802
        return self._answer("cuDeviceGetAttribute", attribute == 102, self.supported)

    def cuMemGetAllocationGranularity(self, kind: Any, option: int) -> tuple:  # noqa: N802
        return self._answer("cuMemGetAllocationGranularity", kind.type == 1 and option == 0, self.granularity)

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple:  # noqa: N802
        at = BASE + sum(self.reserved.values())
        answer = self._answer("cuMemAddressReserve", size % self.granularity == 0, at)
        if answer[0] == 0:
            self.reserved[at] = size
        return answer

    def cuMemCreate(self, size: int, kind: Any, flags: int) -> tuple:  # noqa: N802
        if len(self.handles) == self.capacity:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        handle = max(self.handles, default=0) + 1
        answer = self._answer("cuMemCreate", size % self.granularity == 0 and kind.location.type == 1, handle)
        if answer[0] == 0:
            self.handles[handle], self.device = size, kind.location.id
        return answer

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple:  # noqa: N802
        inside = any(a <= address and address + size <= a + n for a, n in self.reserved.items())
        answer = self._answer(
            "cuMemMap", inside and address not in self.mapped and self.handles.get(handle) == size and offset == 0
        )
        if answer[0] == 0:
            self.mapped[address] = handle
        return answer

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple:  # noqa: N802
        rights = count == len(access) == 1 and access[0].flags == 3 and access[0].location.id == self.device
        covered: set[int] = set()
        while address + sum(self.handles[self.mapped[at]] for at in covered) < address + size:
            at = address + sum(self.handles[self.mapped[at]] for at in covered)
            if at not in self.mapped:
                break
            covered.add(at)
        answer = self._answer("cuMemSetAccess", rights and sum(self.handles[self.mapped[a]] for a in covered) == size)
        if answer[0] == 0:
            self.accessible |= covered
        return answer

    def cuMemUnmap(self, address: int, size: int) -> tuple:  # noqa: N802
        answer = self._answer("cuMemUnmap", self.handles.get(self.mapped.get(address, 0)) == size)
        if answer[0] == 0:
            del self.mapped[address]
            self.accessible.discard(address)
        return answer

    def cuMemRelease(self, handle: int) -> tuple:  # noqa: N802
        return self._answer("cuMemRelease", self.handles.pop(handle, None) is not None)

    def cuMemAddressFree(self, address: int, size: int) -> tuple:  # noqa: N802
        return self._answer("cuMemAddressFree", not self.mapped and self.reserved.pop(address, None) == size)

    def _answer(self, name: str, allowed: bool, *values: Any) -> tuple:
        """(code, value) as the bindings give it: the value is there beside an error too, as None."""
        self.calls.append(name)
        left = self.fail_at.get(name)
        if left is not None:
            self.fail_at[name] = left - 1
        if not allowed or left == 0:
            return Result.CUDA_ERROR_INVALID_VALUE, *(None for _ in values)
        return Result.CUDA_SUCCESS, *values
