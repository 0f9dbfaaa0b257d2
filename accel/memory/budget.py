"""One memory budget of a device, split before anything starts: weights, latents, working memory, pages of KV.

What each engine may hold is then decided by arithmetic, not by which of them looks at free memory first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class DeviceMemory(NamedTuple):
    """Bytes."""

    total: int
    free: int


def device_memory(device: torch.device) -> DeviceMemory:
    """What the device has, and what of it nobody uses; of a CPU, the machine's memory or its container's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, free)
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text().strip()) != "max":
        total = min(total, int(limit))
    return DeviceMemory(total, min(free, total))


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that are spoken for, of both engines together."""

    weights: int = 0
    latents: int = 0  # of all latent slots
    working: int = 0  # activations of the largest batches, captured graphs


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of each part, and the pages of KV that are left room for."""

    needs: Needs
    kv_pages: int
    page_bytes: int

    @property
    def kv(self) -> int:
        return self.kv_pages * self.page_bytes

    @property
    def total(self) -> int:
        return self.needs.weights + self.needs.latents + self.needs.working + self.kv


def split(memory: DeviceMemory, fraction: float, needs: Needs, page_bytes: int, least: int, most: int) -> Budget:
    """Give each part what it needs, and the rest to pages of KV.

    Args:
        fraction: of the device's memory that the process may take, from 0 (exclusive) to 1.
        page_bytes: of one page over all layers, keys and values.
        least: pages without which the longest request that is allowed cannot run.
        most: pages beyond which none could be used.

    Raises:
        ValueError: the fraction is out of range, or fewer than `least` pages fit; it says what fraction would do.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"gpu_memory_fraction: {fraction:g} is not allowed; allowed: above 0, at most 1")
    spoken_for = needs.weights + needs.latents + needs.working
    room = min(int(fraction * memory.total), memory.free)
    pages = max(0, room - spoken_for) // page_bytes
    if pages < least:
        wanted = spoken_for + least * page_bytes
        raise ValueError(
            f"gpu_memory_fraction: {fraction:g} of {_gib(memory.total)}, {_gib(memory.free)} of it free, is too "
            f"little; weights take {_gib(needs.weights)}, latents {_gib(needs.latents)}, working memory "
            f"{_gib(needs.working)} and one longest request {_gib(least * page_bytes)}: {_remedy(wanted, memory)}"
        )
    return Budget(needs, min(pages, most), page_bytes)


def _remedy(wanted: int, memory: DeviceMemory) -> str:
    if wanted > memory.free:
        return "allowed: a device with more free memory, a smaller model or a shorter context"
    return f"allowed: at least {wanted / memory.total + 0.0005:.3f}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
