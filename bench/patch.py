"""One picture on several GPUs against our best on one GPU, in one run: a process for each GPU.

Without --fidelity: a network with random weights, whose speed does not depend on what they say. For each size of
picture, one GPU (compiled, channels last, prompts' keys and values cached, launched as CUDA graphs), then each degree
with displaced patches, fully synchronous, and without communication, which is the bound for displaced patches.

    step            milliseconds of a displaced step (of a synchronous one in full_sync)
    run             milliseconds a step of a whole run, its synchronous warm-up included
    exposed         of a step, more than without communication
    memory          the most that a rank allocated, in GB; sent: MB that a rank gives to each of the others in a step
    off             largest difference from one GPU in a synchronous step, over the largest value

    python bench/patch.py --gpus 4 [--degrees 2 4] [--sizes 1024 2048 3840] [--steps 50] [--launch graph] [--stock]
    python bench/patch.py --gpus 4 --device cpu --spec headstart-v2 --sizes 256 --steps 6 --launch eager

With --fidelity MODEL, a name or a folder: its pictures at each degree and mode against one GPU's, in PSNR.

    python bench/patch.py --gpus 4 --fidelity default --sizes 256 512 [--save out.npz]
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from drawing import PROMPTS
from timing import print_table

from accel.patch.mesh import Mesh, make_mesh
from accel.samplers.library import build_plan
from accel.samplers.noise import gaussian
from models.diffusion.loaded import LoadedModel
from models.diffusion.loading import load_model
from models.diffusion.model import Condition
from models.diffusion.patch import patch_plan
from models.diffusion.patch_denoiser import WARM_UP, PatchDenoiser
from models.diffusion.patch_launch import LAUNCHES
from models.diffusion.patch_vae import PatchDecoder
from models.specs import random_model
from service.config import ModelSettings

TIMEOUT = timedelta(minutes=30)  # ranks wait while one compiles


class Rank:
    """One process of the run."""

    def __init__(self, rank: int, args: argparse.Namespace, pipes: list[Connection]) -> None:
        self.rank = rank
        self.args = args
        self.pipes = pipes  # rank 0's: one for each other rank; another's: its own
        self.cuda = args.device == "cuda"
        self.device = torch.device("cuda", rank) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        else:
            torch.set_num_threads(1)
        backend = "cpu:gloo,cuda:nccl" if self.cuda else "gloo"
        address = f"tcp://127.0.0.1:{args.port}"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=args.gpus, timeout=TIMEOUT)
        degrees = [1, *(degree for degree in args.degrees if degree <= args.gpus)]
        meshes = {degree: make_mesh(range(degree), device=self.device, timeout=TIMEOUT) for degree in degrees}
        self.meshes: dict[int, Mesh | None] = meshes
        self.wait()

    def wait(self) -> None:
        """Until every rank is here."""
        if self.cuda:
            torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))

    def say(self, *words: object) -> None:
        if self.rank == 0:
            print(f"[{time.monotonic() - self.args.begun:6.0f} s]", *words, flush=True)

    def everyone(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.args.gpus
        dist.all_gather_object(values, value)
        return values

    def collectively(self, mesh: Mesh | None, make: Callable[..., Any], action: Callable[[Any], Any]) -> Any:
        """`action(make(mesh, tell))` on rank 0, which the mesh's other ranks follow; the rest wait."""
        result = None
        if mesh is not None:
            pipes = self.pipes[: mesh.degree - 1] if self.rank == 0 else self.pipes

            def tell(call: Any) -> None:
                for pipe in pipes:
                    pipe.send(call)

            patch = make(mesh, tell if mesh.leads else None)
            if mesh.leads:
                result = action(patch)
                tell(None)
            else:
                while (call := self.pipes[0].recv()) is not None:
                    patch.follow(call)
        self.wait()
        return result


class Clock:
    """Milliseconds of a step, by running some of them."""

    def __init__(self, rank: Rank, condition: Condition, shape: tuple[int, int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, *shape, generator=generator).to(rank.device)
        self.alpha = torch.full((1,), 0.7, device=rank.device)
        self.times = torch.linspace(999, 1, 1000, device=rank.device)
        self.condition = condition
        self.synchronize = torch.cuda.synchronize if rank.cuda else lambda: None

    def step(self, network: Any, row: int) -> torch.Tensor:
        told = {"slots": [0], "ran": [row]} if isinstance(network, PatchDenoiser) else {}
        time_of_row = self.times[row % 1000].view(1)
        result: torch.Tensor = network(self.x, time_of_row, self.alpha, [self.condition], **told)
        return result

    def run(self, network: Any, first: int, steps: int) -> float:
        self.synchronize()
        began = time.perf_counter()
        for row in range(first, first + steps):
            self.step(network, row)
        self.synchronize()
        return (time.perf_counter() - began) * 1e3 / steps


def speed(rank: Rank) -> None:
    args = rank.args
    torch.manual_seed(0)
    model = random_model(args.spec, "bfloat16" if rank.cuda else "float32", str(rank.device))
    name = torch.cuda.get_device_name() if rank.cuda else "CPU, one thread a rank"
    rank.say(f"{name}, torch {torch.__version__}, {args.spec}, {model.dtype}, launched as {args.launch}")
    for size in args.sizes:
        _speed_at(rank, model, size)


def _speed_at(rank: Rank, model: LoadedModel, size: int) -> None:
    args = rank.args
    side = size // model.card.scale
    shape = (model.card.latent_channels, side, side)
    with torch.inference_mode():
        scale = 5.0 if args.guidance is None else args.guidance
        condition = model.encode([(PROMPTS[0], "")], [scale], "ddim", (size, size))[0]
        clock = Clock(rank, condition, shape)
        rows: list[list[str]] = []
        if args.stock:
            rows.append(_stock(rank, model, clock))
        single, exact = 0.0, None
        plan = patch_plan(model.denoiser("ddim"))
        for degree, mesh in rank.meshes.items():
            shared = plan.parts(degree, guided=scale > 1) > 1
            modes = ("full_sync", "no_sync", "displaced") if shared else ("displaced",)  # else there is nothing to say
            bound = 0.0
            for mode in modes:
                if rank.cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                found = rank.collectively(
                    mesh,
                    lambda mesh, tell, mode=mode: PatchDenoiser(
                        model.denoiser("ddim"), mesh, tell, mode=mode, launch=args.launch
                    ),
                    lambda patch, mode=mode: _timed(clock, patch, mode, args.steps),
                )
                memory = rank.everyone(torch.cuda.max_memory_allocated() / 1e9 if rank.cuda else math.nan)
                if found is None:
                    continue
                step, whole, sent, output = found
                if degree == 1:
                    single, exact = whole, output
                if mode == "no_sync":
                    bound = step
                off = (output - exact).abs().max() / exact.abs().max()
                rows.append(
                    [
                        f"{degree} {mode}" if shared else f"{degree}",
                        f"{step:.2f}",
                        f"{whole:.2f}",
                        f"{single / whole:.2f}",
                        f"{step - bound:.2f}" if mode == "displaced" and shared else "",
                        f"{max(memory[:degree]):.1f}",
                        f"{sent / 1e6:.1f}" if shared else "",
                        f"{float(off):.1e}" if degree > 1 else "",
                    ]
                )
                rank.say(f"{size}x{size}", *rows[-1])
        if args.decode:
            rows += _decoding(rank, model, shape)
    if rank.rank == 0:
        print(f"\n{size}x{size}, {args.steps} steps, guidance {scale:g}")
        print_table(["GPUs", "step", "run", "speed-up", "exposed", "memory", "sent", "off"], rows)


def _timed(clock: Clock, patch: PatchDenoiser, mode: str, steps: int) -> tuple[float, float, int, torch.Tensor]:
    """(a step, a step of a whole run, bytes sent a step, the output of a synchronous step)."""
    output = clock.step(patch, 0).clone()
    clock.run(patch, 1, WARM_UP + 3)  # compiles, and captures both kinds of call
    clock.run(patch, 0, WARM_UP + 2)
    few = max(3, steps // 5)
    step = statistics.median(clock.run(patch, WARM_UP + few * i, few) for i in range(3))
    # A whole run only where it is reported: of one GPU and of displaced patches.
    whole = clock.run(patch, 0, steps) if mode == "displaced" else step
    return step, whole, patch.row_bytes, output


def _stock(rank: Rank, model: LoadedModel, clock: Clock) -> list[str]:
    """diffusers' UNet under torch.compile on one GPU, its modules as they are, launched one by one."""
    result = [""] * 8
    if rank.rank == 0:
        plain = model.denoiser("ddim")
        network = plain.on(torch.compile(plain.network, dynamic=False))
        clock.run(network, 0, 3)
        step = f"{clock.run(network, 0, 10):.2f}"
        result = ["1 stock, compiled", step, step, "", "", "", "", ""]
    rank.wait()
    return result


def _decoding(rank: Rank, model: LoadedModel, shape: tuple[int, int, int]) -> list[list[str]]:
    rows = []
    latents = torch.randn(1, *shape, device=rank.device)
    wait = torch.cuda.synchronize if rank.cuda else lambda: None

    def timed(decoder: Callable[[torch.Tensor], torch.Tensor]) -> float:
        times = []
        for _ in range(4):
            wait()
            began = time.perf_counter()
            decoder(latents)
            wait()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times[1:])

    for degree, mesh in rank.meshes.items():
        if degree == 1:
            found = timed(model.decoder) if rank.rank == 0 else None
            rank.wait()
        else:
            found = rank.collectively(mesh, lambda mesh, tell: PatchDecoder(model.decoder, mesh, tell), timed)
        if found is not None:
            rows.append([f"{degree} decode", f"{found:.2f}", *[""] * 6])
    return rows


def fidelity(rank: Rank) -> None:
    """PSNR of pictures against those of one GPU."""
    args = rank.args
    model = load_model(args.fidelity, dtype=args.dtype, device=str(rank.device), cache_dir=ModelSettings().cache_dir)
    kept: dict[str, np.ndarray] = {}
    for size in args.sizes:
        _fidelity_at(rank, model, size, kept)
    if args.save and rank.rank == 0:
        np.savez_compressed(args.save, **{key.replace(" ", "_"): value for key, value in kept.items()})


def _fidelity_at(rank: Rank, model: LoadedModel, size: int, kept: dict[str, np.ndarray]) -> None:
    args = rank.args
    prompts = PROMPTS[: args.pictures]
    latents = _draw(rank, model, size, model.denoiser("ddim")) if rank.rank == 0 else None
    rank.wait()
    rows = []
    if latents is not None:
        kept[f"{size} 1"] = model.decode(latents).cpu().numpy()
    for degree, mesh in rank.meshes.items():
        for mode in args.modes if degree > 1 else ():
            found = rank.collectively(
                mesh,
                lambda mesh, tell, mode=mode: PatchDenoiser(
                    model.denoiser("ddim"), mesh, tell, mode=mode, launch=args.launch, warm_up=args.warm_up
                ),
                lambda patch: _draw(rank, model, size, patch),
            )
            if found is None or latents is None:
                continue
            pictures = kept[f"{size} {degree} {mode}"] = model.decode(found).cpu().numpy()
            quality = [psnr(a, b) for a, b in zip(pictures, kept[f"{size} 1"], strict=True)]
            off = float((found - latents).abs().max() / latents.abs().max())
            figures = (statistics.mean(quality), min(quality), psnr(pictures, kept[f"{size} 1"]))
            rows.append([f"{degree} {mode}", *(f"{figure:.1f}" for figure in figures), f"{off:.1e}"])
            rank.say(f"{size}x{size}", *rows[-1])
    if rank.rank == 0:
        print(f"\n{size}x{size}, {args.steps} steps, {len(prompts)} pictures, {model.dtype}")
        print_table(["GPUs", "PSNR, mean", "PSNR, lowest", "PSNR of all", "latents off"], rows)


@torch.inference_mode()
def _draw(rank: Rank, model: LoadedModel, size: int, network: Any) -> torch.Tensor:
    """Latents of the prompts' pictures, all in one batch; noise comes from the place in the list."""
    args, defaults = rank.args, model.card.samplers["ddim"]
    side = size // model.card.scale
    shape = (model.card.latent_channels, side, side)
    plan = build_plan("ddim", model.schedule("ddim"), args.steps, spacing=defaults.spacing)
    scale = args.guidance if args.guidance is not None else defaults.guidance_scale
    prompts = [(prompt, "") for prompt in PROMPTS[: args.pictures]]
    conditions = model.encode(prompts, [scale] * len(prompts), "ddim", (size, size))
    seeds = torch.arange(len(prompts))
    x = gaussian(seeds, -1, shape, rank.device) * plan.init_scale
    for index, row in enumerate(plan.rows):
        t, alpha = (torch.full((len(x),), value, device=rank.device) for value in (row.t, row.alpha))
        patched = isinstance(network, PatchDenoiser)
        told = {"slots": list(range(len(x))), "ran": [index] * len(x)} if patched else {}
        x = row.a * x + row.b * network(x, t, alpha, conditions, **told)
    return x


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean())
    return 99.0 if error == 0 else 10 * math.log10(255.0**2 / error)


def work(rank: int, args: argparse.Namespace, pipes: list[Connection]) -> None:
    warnings.simplefilter("ignore")
    here = Rank(rank, args, pipes)
    (fidelity if args.fidelity else speed)(here)
    here.wait()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu")
    parser.add_argument("--degrees", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 3840])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--spec", default="sdxl")
    parser.add_argument("--launch", choices=LAUNCHES, default="graph" if cuda else "eager")
    parser.add_argument("--stock", action="store_true", help="also diffusers' UNet under torch.compile")
    parser.add_argument("--decode", action="store_true", help="also the VAE's decoder")
    parser.add_argument("--fidelity", metavar="MODEL")
    parser.add_argument("--modes", nargs="+", default=["full_sync", "displaced", "no_sync"])
    parser.add_argument("--pictures", type=int, default=len(PROMPTS))
    parser.add_argument("--guidance", type=float, help="1: none, so that rows alone are shared out")
    parser.add_argument("--warm-up", type=int, default=WARM_UP)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--save", metavar="FILE.npz")
    args = parser.parse_args()
    args.begun = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        args.port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(args.gpus - 1)]
    processes = []
    for rank in range(args.gpus):
        mine = [here for here, _ in pipes] if rank == 0 else [pipes[rank - 1][1]]
        processes.append(context.Process(target=work, args=(rank, args, mine)))
        processes[-1].start()
    failed = None
    while failed is None and any(process.is_alive() for process in processes):
        time.sleep(0.2)
        failed = next((process for process in processes if process.exitcode not in (None, 0)), None)
    if failed is not None:
        for process in processes:
            process.terminate()
        raise SystemExit(f"rank {processes.index(failed)} ended with {failed.exitcode}")


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    main()
