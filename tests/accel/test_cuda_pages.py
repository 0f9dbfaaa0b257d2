"""The CUDA driver's calls, in order and undone when one fails, over a fake of cuda.bindings.driver."""

from __future__ import annotations

import sys

import pytest
import torch

from accel.memory.cuda_pages import CudaPages
from accel.memory.page_driver import VirtualMemoryError
from tests.accel.fake_pages import PAGE, FakeCuda

DEVICE = torch.device("cuda", 1)


def opened(api: FakeCuda, pages: int = 3) -> tuple[CudaPages, int, list[int]]:
    driver = CudaPages(DEVICE, api=api)
    return driver, driver.reserve(8 * PAGE), [driver.create() for _ in range(pages)]


def test_pages_are_mapped_in_place_and_made_accessible_with_one_call() -> None:
    api = FakeCuda()
    driver, address, pages = opened(api)
    api.calls.clear()
    driver.map(address + PAGE, pages)
    assert api.calls == ["cuMemMap"] * 3 + ["cuMemSetAccess"]
    assert api.mapped == {address + PAGE * (i + 1): page for i, page in enumerate(pages)}
    assert api.accessible == set(api.mapped)
    assert api.device == 1


def test_everything_goes_back_in_order() -> None:
    api = FakeCuda()
    driver, address, pages = opened(api)
    driver.map(address, pages)
    for i in range(3):
        driver.unmap(address + i * PAGE)
    for page in pages:
        driver.release(page)
    driver.free(address, 8 * PAGE)
    assert not api.mapped
    assert not api.handles
    assert not api.reserved


@pytest.mark.parametrize("succeed", [0, 1, 2])
def test_a_mapping_that_fails_halfway_is_undone(succeed: int) -> None:
    api = FakeCuda()
    driver, address, pages = opened(api)
    api.fail_at["cuMemMap"] = succeed
    with pytest.raises(VirtualMemoryError, match="cuMemMap: CUDA_ERROR_INVALID_VALUE"):
        driver.map(address, pages)
    assert not api.mapped
    driver.map(address, pages)
    assert len(api.accessible) == 3


def test_a_mapping_that_nobody_may_touch_is_undone() -> None:
    api = FakeCuda()
    driver, address, pages = opened(api)
    api.fail_at["cuMemSetAccess"] = 0
    with pytest.raises(VirtualMemoryError, match="cuMemSetAccess"):
        driver.map(address, pages)
    assert not api.mapped


def test_a_second_mapping_at_an_address_is_the_drivers_error_and_leaves_the_first() -> None:
    api = FakeCuda()
    driver, address, pages = opened(api)
    driver.map(address + PAGE, pages[:1])
    with pytest.raises(VirtualMemoryError, match="cuMemMap"):
        driver.map(address, pages[1:])
    assert api.mapped == {address + PAGE: pages[0]}


def test_a_thread_uses_the_device_and_leaves_captures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    api, devices = FakeCuda(), []
    driver, _, _ = opened(api)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    driver.enter_thread()
    assert devices == [DEVICE]
    assert api.calls[-1] == "cuThreadExchangeStreamCaptureMode"


def test_page_bytes_are_the_devices_unless_asked_for() -> None:
    assert CudaPages(DEVICE, api=FakeCuda(granularity=2 << 20)).page_bytes == 2 << 20
    assert CudaPages(DEVICE, 4 << 20, FakeCuda(granularity=2 << 20)).page_bytes == 4 << 20


@pytest.mark.parametrize("page_bytes", [1 << 20, 3 << 20])
def test_page_bytes_that_the_device_cannot_map_are_refused(page_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"page_bytes: {page_bytes}; allowed: multiples of 2097152 on cuda:1"):
        CudaPages(DEVICE, page_bytes, FakeCuda(granularity=2 << 20))


def test_a_device_without_virtual_memory_is_told() -> None:
    with pytest.raises(VirtualMemoryError, match="cuda:1 has no virtual memory management"):
        CudaPages(DEVICE, api=FakeCuda(supported=0))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(VirtualMemoryError, match="pip install cuda-bindings"):
        CudaPages(DEVICE)


def test_the_real_bindings_have_all_that_is_called() -> None:
    real = pytest.importorskip("cuda.bindings.driver")
    names = [name for name in dir(FakeCuda) if name.lower().startswith("cu")]
    assert len(names) > 10
    for name in names:
        assert hasattr(real, name), name
    kind = real.CUmemAllocationProp()
    kind.type = real.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    kind.location.type = real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    kind.location.id = 3
    access = real.CUmemAccessDesc()
    access.location = kind.location
    access.flags = real.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    assert (kind.location.id, access.location.id) == (3, 3)
