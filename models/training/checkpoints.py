"""Checkpoints of stages: written whole or not at all, by rank 0, read by all."""

from pathlib import Path
from typing import Any

import torch

from models.training.distributed import Clock, Ranks
from models.training.flat import FlatOptimizer

EVERY_SECONDS = 120.0


class Checkpoints:
    """The checkpoint files of one run, one per stage."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder
        self._ranks = ranks
        self._saved = ranks.now()
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, stage: str) -> dict[str, Any] | None:
        """The stage's last checkpoint, or None."""
        path = self._folder / f"{stage}.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location=self._ranks.device, weights_only=True)
        return state

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The stage's checkpoint if the stage is complete, else None."""
        state = self.load(stage)
        return state if state is not None and state["finished"] else None

    def save(self, stage: str, state: dict[str, Any], *, finished: bool) -> None:
        """Write from rank 0; every rank waits when the stage is finished, so that the file can be read."""
        if self._ranks.main:
            partial = self._folder / f"{stage}.partial"
            torch.save({**state, "finished": finished}, partial)
            partial.replace(self._folder / f"{stage}.pt")
        self._saved = self._ranks.now()
        if finished:
            self._ranks.barrier()

    def resume(self, stage: str, optimizer: FlatOptimizer) -> float:
        """Load an unfinished stage's optimiser, if there is one; returns the seconds already spent."""
        state = self.load(stage)
        if state is None:
            return 0.0
        optimizer.load(state["optimizer"])
        self._ranks.log(f"{stage}: resumed at step {optimizer.iterations}, {state['seconds']:.0f} s in")
        return float(state["seconds"])

    def keep(self, stage: str, optimizer: FlatOptimizer, clock: Clock, iteration: int) -> None:
        """Save progress if the last save is old; the ranks need not agree, since only rank 0 writes."""
        if self._ranks.main and iteration % 20 == 0 and self._ranks.now() - self._saved > EVERY_SECONDS:
            seconds = clock.read(1)
            self.save(stage, {"optimizer": optimizer.state(), "seconds": seconds}, finished=False)
