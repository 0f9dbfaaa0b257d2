"""Ranks of one run: who am I, sums over ranks, a common clock, and the log."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process's place among the run's processes. `now` is the clock, in seconds, that budgets are counted on."""

    rank: int
    size: int
    device: torch.device
    started: float
    now: Callable[[], float] = time.time

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Training arithmetic: bfloat16 on GPUs, float32 on the CPU, where bfloat16 training gains nothing."""
        return torch.bfloat16 if self.cuda else torch.float32

    def share(self, batch: int) -> int:
        """This rank's part of a global batch, at least one."""
        return max(1, batch // self.size)

    def log(self, *words: object) -> None:
        if self.main:
            print(f"[{time.time() - self.started:7.1f}s]", *words, flush=True)

    def warn(self, *words: object) -> None:
        """Log from any rank: for faults that must not pass unseen."""
        print(f"[{time.time() - self.started:7.1f}s] !!! WARNING rank {self.rank}:", *words, flush=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """`values` averaged over ranks, in place (gloo has no average, so divide after summing)."""
        return self.sum(values).div_(self.size)

    def from_main(self, values: torch.Tensor) -> torch.Tensor:
        """Rank 0's `values` on every rank, in place."""
        if self.size > 1:
            dist.broadcast(values, 0)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


class Clock:
    """Seconds that a stage has trained, the same on every rank; starts when first asked, so compiling is free."""

    def __init__(self, ranks: Ranks, spent: float) -> None:
        self.ranks = ranks
        self.spent = spent
        self._start: float | None = None
        self._seconds = spent

    def start(self) -> None:
        """Start counting now, once the first step (with its compilation) is through."""
        if self.ranks.cuda:
            torch.cuda.synchronize()
        self._start = self.ranks.now()

    def read(self, iteration: int, every: int = 20) -> float:
        """Seconds spent; rank 0's clock is passed to the others every `every` iterations."""
        if self._start is not None and iteration % every == 0:
            here = torch.tensor([self.spent + self.ranks.now() - self._start], device=self.ranks.device)
            self._seconds = float(self.ranks.from_main(here).item())
        return self._seconds


def join(started: float) -> Ranks:
    """This process's ranks, from RANK, RANKS and RENDEZVOUS in the environment (one rank when they are absent)."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("RANKS", "1"))
    cuda = torch.cuda.is_available()
    # The launcher shows each process one GPU, so its index is always 0.
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if size > 1:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, init_method=f"file://{os.environ['RENDEZVOUS']}", rank=rank, world_size=size)
    return Ranks(rank, size, device, started)


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
