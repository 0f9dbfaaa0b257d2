"""What virtual memory asks of a device: address space, and pages that are mapped into it and taken out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Page = Any  # a driver's handle of one page of physical memory


class VirtualMemoryError(RuntimeError):
    """The device's memory driver refused a call, or there is none; the message names the call and the reason."""


class Fence(Protocol):
    """A place in the device's work; torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class PageDriver(Protocol):
    """Virtual memory of one device. Every method raises VirtualMemoryError; a failed call has changed nothing.

    Calls come from several threads, one at a time.
    """

    page_bytes: int

    def reserve(self, nbytes: int) -> int:
        """The address of nbytes of address space, a multiple of page_bytes, with nothing mapped."""

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8 over a reservation, mapped or not. Not to be touched after `free`."""

    def create(self) -> Page:
        """One page of physical memory."""

    def map(self, address: int, pages: Sequence[Page]) -> None:
        """Put pages one after another at an address; readable and writable when this returns."""

    def unmap(self, address: int) -> None:
        """Take out the page that was mapped at an address. The device must be done with it."""

    def release(self, page: Page) -> None:
        """Give an unmapped page back to the device."""

    def free(self, address: int, nbytes: int) -> None:
        """Give a reservation back; nothing is mapped in it."""

    def fence(self) -> Fence | None:
        """A fence behind all work that the calling thread has issued; None: that work is done already."""

    def enter_thread(self) -> None:
        """Called once by a thread of its own before it maps anything."""
