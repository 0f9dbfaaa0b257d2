"""The KV that is contiguous in virtual memory: shapes, contents, real memory, and the budget, in tokens."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.kernels.kv_write import kv_write
from accel.memory.virtual_kv import KVFull, VirtualKV, VirtualMemoryError
from tests.accel.fake_pages import FakePages
from tests.accel.test_cpu_pages import resident

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="virtual memory on the CPU needs Linux")

PAGE = 16 * 1024
SMOL = {"layers": 30, "kv_heads": 3, "head_dim": 64}


def small(**changed: object) -> VirtualKV:
    """Tokens of 768 bytes, 21 and a third of them a page; three slots of 64 rows, a budget of eight pages."""
    sizes = {"layers": 4, "slots": 3, "max_length": 50, "kv_heads": 3, "head_dim": 8, "dtype": torch.float32}
    return VirtualKV(**{**sizes, "device": "cpu", "budget_bytes": 8 * PAGE, "page_bytes": PAGE, **changed})  # type: ignore[arg-type]


@pytest.fixture
def kv() -> Iterator[VirtualKV]:
    opened = small()
    yield opened
    opened.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_and_values_of_all_layers_are_apart_and_keep_what_is_written(dtype: torch.dtype) -> None:
    kv = small(dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(2, 4, 3, 50, 3, 8, generator=generator).to(dtype)
    for slot in range(3):
        kv.grow(slot, 20 + slot)
        for layer in range(4):
            kv.keys(layer)[slot, : 20 + slot] = written[0, layer, slot, : 20 + slot]
            kv.values(layer)[slot, : 20 + slot] = written[1, layer, slot, : 20 + slot]
    kv.grow(1, 50)
    for layer in range(4):
        kv.keys(layer)[1, 21:50] = written[0, layer, 1, 21:50]
        kv.values(layer)[1, 21:50] = written[1, layer, 1, 21:50]
    for slot, length in enumerate((20, 50, 22)):
        for layer in range(4):
            assert torch.equal(kv.keys(layer)[slot, :length], written[0, layer, slot, :length])
            assert torch.equal(kv.values(layer)[slot, :length], written[1, layer, slot, :length])
    kv.close()


def test_rows_flatten_so_that_tokens_are_written_by_row_number(kv: VirtualKV) -> None:
    kv.grow(2, 31)
    k, v = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    kv_write(k, v, kv.keys(1), kv.values(1), torch.tensor([2 * kv.rows + 30, -1]))
    assert torch.equal(kv.keys(1)[2, 30], k[0])
    assert torch.equal(kv.values(1)[2, 30], v[0])


@given(
    layers=st.integers(1, 7),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([1, 8, 10, 64]),
    length=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_whatever_the_model_slots_begin_with_a_page(
    layers: int, heads: int, head_dim: int, length: int, dtype: torch.dtype
) -> None:
    kv = VirtualKV(layers, 3, length, heads, head_dim, dtype, "cpu", 1 << 23, page_bytes=4096)
    assert kv.rows >= length
    assert kv.rows * kv.token_bytes % 4096 == 0
    assert kv.keys(0).shape == (3, kv.rows, heads, head_dim)
    last = kv.values(layers - 1).view(-1, heads, head_dim)[kv.rows + length - 1]
    kv.grow(1, length)
    last.fill_(1)
    assert resident(kv.keys(0).data_ptr(), 3 * kv.rows * kv.token_bytes) <= kv.bytes_mapped
    kv.close()


def test_the_default_model_wastes_half_a_page_a_sequence() -> None:
    kv = VirtualKV(**SMOL, slots=64, max_length=8192, dtype=torch.bfloat16, device="cpu", budget_bytes=64 << 20)
    lengths = [random.Random(slot).randint(1, 60) for slot in range(64)]
    for slot, length in enumerate(lengths):
        kv.grow(slot, length)
    waste = kv.bytes_needed - kv.bytes_used(lengths)
    assert 0.3 * 64 * kv.page_bytes < waste < 0.7 * 64 * kv.page_bytes
    assert kv.rows == 8192
    kv.close()


def test_memory_is_resident_as_long_as_it_is_mapped() -> None:
    kv = VirtualKV(**SMOL, slots=16, max_length=8192, dtype=torch.bfloat16, device="cpu", budget_bytes=32 << 20)
    address, size = kv.keys(0).data_ptr(), 16 * 8192 * kv.token_bytes
    slack = 16 * 4096  # zero pages and the like
    assert size > 80 * kv.budget_bytes
    assert resident(address, size) <= slack
    for slot in range(4):
        kv.grow(slot, 100 * (slot + 1))
        kv.settle()
        assert 0 <= resident(address, size) - kv.bytes_mapped <= slack
    assert kv.bytes_mapped >= kv.bytes_used([100, 200, 300, 400])
    for slot in range(4):
        kv.free(slot)
    kv.settle()
    held = kv.bytes_mapped
    assert held > 0  # deferred
    assert 0 <= resident(address, size) - held <= slack
    kv.grow(9, 1400)  # all but the least of the budget: the others' pages come here
    assert kv.bytes_mapped <= 32 << 20
    assert 0 <= resident(address, size) - kv.bytes_mapped <= slack
    keys = kv.keys(0)
    kv.close()
    assert resident(address, size) <= slack
    del keys


def test_a_budget_that_is_used_up_is_told_and_nothing_is_lost(kv: VirtualKV) -> None:
    kv.grow(0, 50)
    kv.grow(1, 50)
    kv.keys(0)[0, :50] = 1
    assert kv.pages_available == 2
    with pytest.raises(KVFull, match=r"slot 2 lacks 3 pages of 16384 bytes; 2 are left"):
        kv.grow(2, 50)
    assert kv.pages_available == 2
    kv.grow(2, 42)
    assert kv.bytes_mapped == kv.budget_bytes
    assert kv.keys(0)[0, :50].eq(1).all()
    kv.free(1)
    kv.grow(2, 50)


def test_the_budget_is_no_larger_than_what_all_slots_can_use() -> None:
    kv = small(budget_bytes=1 << 40)
    assert kv.budget_bytes == 3 * 3 * PAGE
    kv.close()


def test_prefetching_stops_at_the_longest_sequence_and_is_counted_as_hidden(kv: VirtualKV) -> None:
    kv.prefetch(0, 10_000)
    kv.settle()
    mapped, mapping = kv.bytes_mapped, kv.seconds_mapping
    assert mapped == kv.pages_for(50) * PAGE
    assert 0 < kv.seconds_hidden == mapping
    kv.grow(0, 50)
    kv.settle()
    assert kv.bytes_mapped == mapped + kv.pages_for(50) * PAGE  # for the next sequence, now that this one came


def test_mapping_that_somebody_waits_for_is_not_hidden(kv: VirtualKV) -> None:
    kv.grow(0, 50)
    assert kv.seconds_mapping > 0
    assert kv.seconds_hidden < kv.seconds_mapping


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": 0}, "layers: 0; allowed: at least 1"),
        ({"slots": 0}, "slots: 0; allowed: at least 1"),
        ({"max_length": 0}, "max_length: 0; allowed: at least 1"),
        ({"kv_heads": -1}, "kv_heads: -1; allowed: at least 1"),
        ({"head_dim": 0}, "head_dim: 0; allowed: at least 1"),
        ({"budget_bytes": PAGE - 1}, "budget_bytes: 16383; allowed: at least one page, 16384"),
        ({"page_bytes": 5000}, "page_bytes: 5000; allowed: multiples of 4096"),
        ({"device": "meta"}, "device: meta; allowed: cpu, cuda"),
    ],
)
def test_sizes_out_of_range_are_named(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_told() -> None:
    with pytest.raises(VirtualMemoryError, match="device: cuda, but torch sees no CUDA device"):
        small(device="cuda")


def test_calls_out_of_range_are_named(kv: VirtualKV) -> None:
    for call in (kv.free, lambda slot: kv.grow(slot, 1), lambda slot: kv.prefetch(slot, 1)):
        for slot in (-1, 3):
            with pytest.raises(ValueError, match=f"slot: {slot}; allowed: 0 to 2"):
                call(slot)
    for length in (0, 51):
        with pytest.raises(ValueError, match=f"length: {length}; allowed: 1 to 50"):
            kv.grow(0, length)


def test_a_closed_kv_refuses_and_closes_again(kv: VirtualKV) -> None:
    kv.grow(0, 5)
    kv.close()
    kv.close()
    with pytest.raises(ValueError, match="the KV is closed"):
        kv.grow(0, 6)
    with pytest.raises(ValueError, match="the KV is closed"):
        kv.free(0)


class Watched(FakePages):
    """Memory that is only counted, below the real shapes; the tensor is a description of addresses."""

    page_bytes = 2 << 20

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")


def test_at_two_mebibytes_a_page_grows_every_91_tokens_of_the_default_model() -> None:
    driver = Watched()
    driver_page = driver.page_bytes
    kv = VirtualKV(
        **SMOL,
        slots=256,
        max_length=8192,
        dtype=torch.bfloat16,
        device="cuda",
        budget_bytes=100 * driver_page,
        driver=driver,
    )
    assert kv.keys(29).shape == (256, 8192, 3, 64)
    mapped = []
    for length in range(1, 8193):
        kv.grow(0, length)
        mapped.append(kv.pages_available)
        if length == 1000:
            break
    assert mapped[90] == 99
    assert mapped[91] == 98
    assert mapped[999] == 100 - 11
    kv.close()
