"""What every training loop counts: steps, time, speed, losses."""

import math
import time
from collections import deque
from typing import Any

import torch
from torch import nn

from models.training.distributed import Clock
from models.training.networks import millions


class Meter:
    """Counts the steps of one stage in this process.

    elapsed: seconds trained, with those before an interruption.
    done: steps since the process began.
    """

    def __init__(self, clock: Clock, pictures: int, window: int = 200) -> None:
        """`pictures`: a step's, over all ranks. Means are over the last `window` steps."""
        self.elapsed, self.done = clock.spent, 0
        self.first_loss = math.nan
        self._clock, self._pictures = clock, pictures
        self._recent: deque[torch.Tensor] = deque(maxlen=window)
        self._began = time.time()

    def step(self, losses: torch.Tensor) -> None:
        """One step is through: its losses [K], detached, of which the first is the one that figures tell.

        The first step compiles, so time counts from its end.
        """
        self._recent.append(losses)
        self.done += 1
        if self.done == 1:
            self.first_loss = float(losses[0])
            self._clock.start()
            self._began = time.time()
        self.elapsed = self._clock.read(self.done)

    def means(self) -> list[float]:
        """Recent means of the losses [K]; waits for the device."""
        means: list[float] = torch.stack(list(self._recent)).mean(0).tolist()
        return means

    @property
    def speed(self) -> float:
        """Pictures a second over all ranks, without the first step."""
        return (self.done - 1) * self._pictures / max(1e-3, time.time() - self._began)

    def due(self, every: int, early: tuple[int, ...]) -> bool:
        """Whether this step is to be logged."""
        return self.done in early or self.done % every == 0

    def figures(self, steps: int, network: nn.Module) -> dict[str, Any]:
        """What metrics.json keeps; `steps` are those of the whole stage."""
        return {
            "steps": steps,
            "pictures": steps * self._pictures,
            "pictures_per_second": self.speed,
            "first_loss": self.first_loss,
            "last_loss": self.means()[0] if self._recent else math.nan,
            "parameters_m": millions(network),
        }
