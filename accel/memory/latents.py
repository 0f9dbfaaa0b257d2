"""Device memory of the running pictures' latents, by resolution."""

from __future__ import annotations

import torch

Shape = tuple[int, int, int]  # (C, h, w)

_SMALLEST_POOL = 4


class LatentSlots:
    """Slots of (x, previous denoised, finite), in one pool for each latent shape, up to `limit` pictures in all.

    A pool doubles when it is full, so `tensors` must be asked anew after every `acquire`. Pools without pictures are
    dropped when a new shape arrives.
    """

    def __init__(self, limit: int, device: torch.device | str = "cpu") -> None:
        if limit < 1:
            raise ValueError(f"limit: {limit}; allowed: at least 1")
        self.limit = limit
        self._device = torch.device(device)
        self._pools: dict[Shape, _Pool] = {}

    def __len__(self) -> int:
        """Slots in use, over all shapes."""
        return sum(len(pool) for pool in self._pools.values())

    @property
    def free(self) -> int:
        """Pictures that still fit."""
        return self.limit - len(self)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes that hold memory."""
        return tuple(self._pools)

    def acquire(self, shape: Shape) -> int:
        """Take a slot. Its `finite` is True; x and previous hold what an earlier owner left.

        Raises:
            MemoryError: all slots are in use.
        """
        if self.free == 0:
            raise MemoryError(f"all {self.limit} latent slots are in use")
        if shape not in self._pools:
            self._pools = {other: pool for other, pool in self._pools.items() if len(pool)}
            self._pools[shape] = _Pool(shape, self._device)
        return self._pools[shape].acquire(self.limit)

    def release(self, shape: Shape, slot: int) -> None:
        """Give a slot back. Raises ValueError if it is not in use."""
        if shape not in self._pools:
            raise ValueError(f"slot {slot} of shape {shape} is not in use")
        self._pools[shape].release(slot)

    def tensors(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x, previous, finite): [S, C, h, w] float32, the same, and [S] bool. KeyError if no slot was ever taken."""
        pool = self._pools[shape]
        return pool.x, pool.previous, pool.finite


class _Pool:
    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.x = torch.zeros(0, *shape, device=device)
        self.previous = torch.zeros_like(self.x)
        self.finite = torch.zeros(0, dtype=torch.bool, device=device)
        self._free: list[int] = []
        self._used: set[int] = set()

    def __len__(self) -> int:
        return len(self._used)

    def acquire(self, limit: int) -> int:
        if not self._free:
            self._grow(min(limit, max(_SMALLEST_POOL, 2 * len(self.x))))
        slot = self._free.pop()
        self._used.add(slot)
        self.finite[slot] = True
        return slot

    def release(self, slot: int) -> None:
        if slot not in self._used:
            raise ValueError(f"slot {slot} of shape {tuple(self.x.shape[1:])} is not in use")
        self._used.remove(slot)
        self._free.append(slot)

    def _grow(self, capacity: int) -> None:
        before, added = len(self.x), capacity - len(self.x)
        self._free.extend(reversed(range(before, capacity)))
        room = self.x.new_zeros(added, *self.x.shape[1:])
        self.x = torch.cat([self.x, room])
        self.previous = torch.cat([self.previous, room])
        self.finite = torch.cat([self.finite, self.finite.new_zeros(added)])
