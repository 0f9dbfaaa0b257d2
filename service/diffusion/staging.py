"""What a tick's pictures differ in, sent to the device as one block of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from service.diffusion.picture import Picture

ROW_BYTES = 48  # three int64 and six float32
AHEAD = 2  # ticks that the host may be ahead of the device


class StagedRows(NamedTuple):
    """On the device. B rows; views of one block."""

    slots: torch.Tensor  # [B] int64
    seeds: torch.Tensor  # [B] int64, uint32 values
    rows: torch.Tensor  # [B] int64, index in the full plan
    t: torch.Tensor  # [B] float32
    alpha: torch.Tensor  # [B] float32
    coefficients: torch.Tensor  # [B, 4] float32: a, b, c, s


class Staging:
    """Host blocks, pinned and taken in turn on a GPU, so that sending a tick makes the host wait for nothing recent.

    A block is written again only when the device has finished the tick that it was sent for. This also bounds how far
    the host runs ahead: to AHEAD ticks, so that an abort takes effect within them.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._blocks = [torch.empty(max_rows * ROW_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(AHEAD)]
        self._done = [torch.cuda.Event() for _ in range(AHEAD)] if on_gpu else []
        self._turn = 0

    def send(self, pictures: Sequence[Picture]) -> StagedRows:
        """Stage the next row of each picture, at most `max_rows` of them."""
        self._turn = (self._turn + 1) % AHEAD
        if self._done:
            self._done[self._turn].synchronize()
        count = len(pictures)
        block = self._blocks[self._turn][: count * ROW_BYTES]
        host = block.numpy()
        integers = host[: 24 * count].view(np.int64).reshape(3, count)
        integers[0] = [picture.slot for picture in pictures]
        integers[1] = [picture.seed for picture in pictures]
        integers[2] = [picture.plan.first + picture.cursor for picture in pictures]
        reals = host[24 * count :].view(np.float32)
        rows = [picture.row for picture in pictures]
        reals[:count] = [row.t for row in rows]
        reals[count : 2 * count] = [row.alpha for row in rows]
        reals[2 * count :].reshape(count, 4)[:] = [(row.a, row.b, row.c, row.s) for row in rows]
        sent = block.to(self._device, non_blocking=True)
        slots, seeds, indices = sent[: 24 * count].view(torch.int64).view(3, count)
        floats = sent[24 * count :].view(torch.float32)
        return StagedRows(
            slots, seeds, indices, floats[:count], floats[count : 2 * count], floats[2 * count :].view(count, 4)
        )

    def mark(self) -> None:
        """All work that reads the rows last sent has been given to the device."""
        if self._done:
            self._done[self._turn].record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Until the device has finished the tick last sent."""
        if self._done:
            self._done[self._turn].synchronize()
