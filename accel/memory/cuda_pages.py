"""Virtual memory of a CUDA device, through the driver's virtual memory management (cuMem...) and cuda-bindings."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from accel.memory.page_driver import Page, VirtualMemoryError
from accel.memory.raw_tensor import tensor_at


class CudaPages:
    """A `PageDriver` over cuda.bindings.driver. CUDA must have been initialised on the device (torch does it)."""

    def __init__(self, device: torch.device, page_bytes: int | None = None, api: Any = None) -> None:
        """
        Args:
            device: with its index.
            page_bytes: None: the least that the device maps, 2 MiB as a rule.
            api: stands in for cuda.bindings.driver in tests.
        """
        self._device = device
        self._api = api = api or _bindings()
        self._call("cuInit", 0)
        self._require_support()
        self._kind = api.CUmemAllocationProp()
        self._kind.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._kind.location.id = device.index
        self._access = api.CUmemAccessDesc()
        self._access.location = self._kind.location
        self._access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = int(self._call("cuMemGetAllocationGranularity", self._kind, least))
        self.page_bytes = page_bytes or granularity
        if self.page_bytes < granularity or self.page_bytes % granularity:
            raise ValueError(f"page_bytes: {page_bytes}; allowed: multiples of {granularity} on {device}")

    def reserve(self, nbytes: int) -> int:
        return int(self._call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return tensor_at(address, nbytes, self._device)

    def create(self) -> Page:
        return self._call("cuMemCreate", self.page_bytes, self._kind, 0)

    def map(self, address: int, pages: Sequence[Page]) -> None:
        """Access is given once for all: it is the dearest of these calls (38 us of 40 in vAttention's table)."""
        mapped = 0
        try:
            for page in pages:
                self._call("cuMemMap", address + mapped, self.page_bytes, 0, page, 0)
                mapped += self.page_bytes
            self._call("cuMemSetAccess", address, mapped, [self._access], 1)
        except VirtualMemoryError:
            for offset in range(0, mapped, self.page_bytes):
                self.unmap(address + offset)
            raise

    def unmap(self, address: int) -> None:
        self._call("cuMemUnmap", address, self.page_bytes)

    def release(self, page: Page) -> None:
        self._call("cuMemRelease", page)

    def free(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def fence(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def enter_thread(self) -> None:
        """The thread's calls no longer break a CUDA graph that another thread is capturing: they touch none of it."""
        torch.cuda.set_device(self._device)
        relaxed = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._call("cuThreadExchangeStreamCaptureMode", relaxed)

    def _require_support(self) -> None:
        attribute = self._api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self._call("cuDeviceGetAttribute", attribute, self._call("cuDeviceGet", self._device.index)):
            raise VirtualMemoryError(f"{self._device} has no virtual memory management")

    def _call(self, name: str, *args: Any) -> Any:
        """What the function of this name gives beside its error code, if anything."""
        code, *values = getattr(self._api, name)(*args)
        if code != self._api.CUresult.CUDA_SUCCESS:
            raise VirtualMemoryError(f"{name}: {code.name}")
        return values[0] if values else None


def _bindings() -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except ImportError as error:
        raise VirtualMemoryError(
            "virtually contiguous KV on CUDA needs the package cuda-bindings: pip install cuda-bindings"
        ) from error
