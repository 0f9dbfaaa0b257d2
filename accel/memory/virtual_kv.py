"""KV memory that is contiguous in virtual memory and mapped page by page as sequences grow (vAttention).

One tensor holds keys and values of all layers of a slot, token by token ("tensor slicing"), so that a sequence wastes
half a page in all and not half a page for each layer's keys and each layer's values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from accel.memory.cpu_pages import DEFAULT_PAGE_BYTES, CpuPages
from accel.memory.cuda_pages import CudaPages
from accel.memory.page_driver import PageDriver, VirtualMemoryError
from accel.memory.slot_pages import KVFull, SlotPages

__all__ = ["KVFull", "VirtualKV", "VirtualMemoryError", "open_driver"]


class VirtualKV:
    """Keys and values of `slots` sequences of up to `max_length` tokens each, in `budget_bytes` of memory.

    Rows beyond a slot's grown length must not be touched: on a GPU that is a fault. What grown rows hold is what an
    earlier owner left there, until they are written.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        budget_bytes: int,
        page_bytes: int | None = None,
        driver: PageDriver | None = None,
    ) -> None:
        """
        Args:
            budget_bytes: of physical memory, taken at once; rounded down to pages.
            page_bytes: None: 2 MiB (what the device maps) on CUDA, 256 KiB on the CPU.
            driver: None: that of the device.

        Raises:
            ValueError: a size out of range.
            VirtualMemoryError: the device has too little memory or address space, or no virtual memory.
        """
        sizes = {"layers": layers, "slots": slots, "max_length": max_length, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: {value}; allowed: at least 1")
        driver = driver or open_driver(torch.device(device), page_bytes)
        if budget_bytes < driver.page_bytes:
            raise ValueError(f"budget_bytes: {budget_bytes}; allowed: at least one page, {driver.page_bytes}")
        self.slots, self.max_length, self.page_bytes = slots, max_length, driver.page_bytes
        self.token_bytes = layers * 2 * kv_heads * head_dim * dtype.itemsize
        # A slot begins with a page and with a row: its rows are a multiple of those that fill whole pages.
        step = driver.page_bytes // math.gcd(driver.page_bytes, self.token_bytes)
        self.rows = -(-max_length // step) * step
        slot_pages = self.rows * self.token_bytes // driver.page_bytes
        most = slots * self.pages_for(max_length)
        self._pages = SlotPages(driver, slots, slot_pages, min(budget_bytes // driver.page_bytes, most))
        memory = driver.tensor(self._pages.address, slots * self.rows * self.token_bytes)
        views = memory.view(dtype).view(slots, self.rows, layers, 2, kv_heads, head_dim)
        self._keys = [views[:, :, layer, 0] for layer in range(layers)]
        self._values = [views[:, :, layer, 1] for layer in range(layers)]

    def keys(self, layer: int) -> torch.Tensor:
        """[slots, rows, Hkv, D], strided; `rows` is max_length, rounded up so that the first two dimensions flatten."""
        return self._keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """[slots, rows, Hkv, D], as keys."""
        return self._values[layer]

    def pages_for(self, length: int) -> int:
        """Pages that a sequence of `length` tokens takes."""
        return -(-length * self.token_bytes // self.page_bytes)

    def grow(self, slot: int, length: int) -> None:
        """Make the first `length` rows of a slot usable, in all layers; the slot is in use from now on.

        Raises:
            KVFull: the budget is too small beside what the slots in use need; nothing has changed.
            ValueError: slot or length out of range, or the KV is closed.
            VirtualMemoryError: the device's driver failed; the slot is as it was.
        """
        self._require_slot(slot)
        if not 1 <= length <= self.max_length:
            raise ValueError(f"length: {length}; allowed: 1 to {self.max_length}")
        self._pages.ensure(slot, self.pages_for(length))

    def prefetch(self, slot: int, length: int) -> None:
        """Map what `grow(slot, length)` will need in the background; as much as fits. Beyond max_length: max_length.

        It may name a slot that is not in use yet: then it is for the request that comes next.
        """
        self._require_slot(slot)
        self._pages.prefetch(slot, self.pages_for(min(length, self.max_length)))

    def free(self, slot: int) -> None:
        """The sequence is done, or never grew. The slot keeps its pages for the next one, until others need them.

        Call it on the stream that the sequence ran on: pages move on only once the work issued there is done.

        Raises:
            ValueError: the slot is out of range, or the KV is closed.
        """
        self._require_slot(slot)
        self._pages.free(slot)

    def next_slot(self) -> int | None:
        """The slot that has memory mapped for the next sequence: the one freed last (0 at first); None: all in use."""
        return self._pages.next_slot()

    def settle(self) -> None:
        """Wait until what was asked of the background so far is done."""
        self._pages.settle()

    def close(self) -> None:
        """Give all memory back. The tensors must not be touched any more."""
        self._pages.close()

    @property
    def budget_bytes(self) -> int:
        """Physical memory held."""
        return self._pages.pages * self.page_bytes

    @property
    def pages_available(self) -> int:
        """Pages that `grow` can still hand out: all but those that slots in use need."""
        return self._pages.available

    @property
    def bytes_mapped(self) -> int:
        """In slots in use and in freed ones, ahead of need included."""
        return self._pages.mapped * self.page_bytes

    @property
    def bytes_needed(self) -> int:
        """Of bytes_mapped, what slots in use have grown to; the rest moves to whoever needs it."""
        return (self._pages.pages - self._pages.available) * self.page_bytes

    def bytes_used(self, lengths: Iterable[int]) -> int:
        """What the tokens of sequences of these lengths fill."""
        return sum(lengths) * self.token_bytes

    @property
    def seconds_mapping(self) -> float:
        """Time in the driver's calls so far, in the background or not."""
        return self._pages.seconds_mapping

    @property
    def seconds_hidden(self) -> float:
        """Of seconds_mapping, what nobody waited for: background calls, less the waits of `grow` for its turn."""
        return max(0.0, self._pages.seconds_background - self._pages.seconds_waited)

    def _require_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot: {slot}; allowed: 0 to {self.slots - 1}")


def open_driver(device: torch.device, page_bytes: int | None = None) -> PageDriver:
    """Virtual memory of a device; raises as VirtualKV."""
    if device.type == "cpu":
        return CpuPages(page_bytes or DEFAULT_PAGE_BYTES)
    if device.type != "cuda":
        raise ValueError(f"device: {device}; allowed: cpu, cuda")
    if not torch.cuda.is_available():
        raise VirtualMemoryError(f"device: {device}, but torch sees no CUDA device")
    torch.cuda.synchronize(device)  # the device is initialised from here on
    index = torch.cuda.current_device() if device.index is None else device.index
    return CudaPages(torch.device("cuda", index), page_bytes)
