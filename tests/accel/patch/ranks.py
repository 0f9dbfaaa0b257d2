"""Ranks on this machine: processes over gloo that run one function, and what each of them returned.

They are forked from a server that has imported what they need, so that starting four of them takes no four imports.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)
PRELOAD = [
    "tests.accel.patch.ranks",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip",
    "peft.tuners.lora",
    "torch._dynamo",
]


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on each of `world` ranks; raises what any of them raises."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    work = (world, folder, function, arguments)
    mp.start_processes(_work, work, nprocs=world, start_method="forkserver")  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
