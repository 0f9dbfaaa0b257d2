"""What the engine costs outside the network, and what batching gives.

    python bench/engine.py overhead [--device cuda] [--batch 8]
    python bench/engine.py throughput (--model default | --spec sd15) [--size 512x512] [--steps 20] [--guidance 7.5]

`overhead`, which also runs when no command is given, has a network that returns one preallocated tensor, so that what
remains of a tick of guided pictures is everything around the network. `throughput` draws the same pictures at 1, 2, 4
and 8 at once and compares the rates. Both check first that the pictures are finite. Tables are Markdown; seconds are
wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from drawing import BareModel, draw

from models.diffusion.model import DiffusionModel, SamplerDefaults
from service.config import EngineSettings, ModelSettings
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import ImageRequest

WARM_UP = 20  # ticks
AT_ONCE = (1, 2, 4, 8)


class EmptyUNet:
    """Returns a preallocated output."""

    def __init__(self, device: torch.device, rows: int) -> None:
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self.config = SimpleNamespace(time_cond_proj_dim=None, addition_embed_type=None)
        self._output = torch.randn(rows, 4, 64, 64, device=device, dtype=self.dtype)

    def __call__(self, sample: torch.Tensor, *ignored: object, **also_ignored: object) -> tuple[torch.Tensor]:
        return (self._output[: len(sample)],)


def empty_model(device: torch.device, rows: int) -> BareModel:
    """Its network does nothing for up to so many rows."""
    samplers = {name: SamplerDefaults(50, 1.0, "trailing") for name in ("ddim", "euler_a", "dpmpp_2m_sde")}
    return BareModel(EmptyUNet(device, rows), 64, samplers, guided=True)


def plain(number: int, sampler: str, steps: int, guidance: float, size: tuple[int, int]) -> ImageRequest:
    return ImageRequest(
        id=str(number),
        prompt=f"a red apple on a blue background, number {number}",
        negative_prompt="",
        n=1,
        width=size[0],
        height=size[1],
        steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
        eta=0.0,
        seed=number,
    )


def check(engine: DiffusionEngine, requests: Sequence[ImageRequest]) -> None:
    """Non-finite latents fail a request; a constant picture would be as wrong."""
    for image in draw(engine, requests, len(requests)):
        if np.asarray(image.pixels).std() < 1:
            raise SystemExit(f"picture {image.request_id} is of one colour")
    print(f"{len(requests)} pictures drawn first: all finite, none constant\n")


def overhead(device: torch.device, batch: int, ticks: int) -> None:
    print(f"Host time of one engine step outside the network, {describe(device)}, batch {batch}, latents [4, 64, 64]\n")
    settings = EngineSettings(max_batch=2 * batch)  # network rows: guided pictures take two
    check(
        DiffusionEngine(empty_model(device, 2 * batch), settings),
        [plain(i, "euler_a", 5, 7.5, (512, 512)) for i in range(batch)],
    )
    print("| sampler | median ms | p90 ms | largest ms |\n| --- | --- | --- | --- |")
    for sampler in ("ddim", "euler_a", "dpmpp_2m_sde"):
        times = sorted(
            1e3 * seconds for seconds in step_times(empty_model(device, 2 * batch), settings, sampler, batch, ticks)
        )
        print(f"| {sampler} | {statistics.median(times):.3f} | {times[int(0.9 * len(times))]:.3f} | {times[-1]:.3f} |")


def step_times(model: DiffusionModel, settings: EngineSettings, sampler: str, batch: int, ticks: int) -> list[float]:
    """Seconds of each engine step in which a full batch runs one row and no picture begins or ends."""
    engine = DiffusionEngine(model, settings)
    for number in range(batch):
        engine.add(plain(number, sampler, WARM_UP + ticks + 1, 7.5, (512, 512)))
    times = []
    for _ in range(WARM_UP + ticks):
        begun = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begun)
    return times[WARM_UP:]


def throughput(model: DiffusionModel, options: argparse.Namespace) -> None:
    card = model.card
    size = tuple(map(int, options.size.split("x"))) if options.size else card.default_size
    sampler = options.sampler or card.default_sampler
    guidance = card.samplers[sampler].guidance_scale if options.guidance is None else options.guidance
    steps = options.steps or card.samplers[sampler].steps
    print(
        f"{card.name}, {describe(model.device)}, {model.dtype}, {size[0]}x{size[1]}, {sampler}, {steps} steps, "
        f"guidance {guidance:g}, {options.pictures} pictures each\n"
    )
    settings = EngineSettings(max_batch=2 * max(AT_ONCE))
    engine = DiffusionEngine(model, settings)
    requests = [plain(i, sampler, steps, guidance, size) for i in range(options.pictures)]
    check(engine, requests[: max(AT_ONCE)])
    rates: dict[int, list[float]] = {at_once: [] for at_once in AT_ONCE}
    for at_once in AT_ONCE:
        draw(engine, [plain(i, sampler, min(steps, 2), guidance, size) for i in range(at_once)], at_once)  # warm
    for _ in range(options.rounds):
        for at_once in AT_ONCE:
            begun = time.perf_counter()
            draw(engine, requests, at_once)
            rates[at_once].append(len(requests) / (time.perf_counter() - begun))
    print("| at once | pictures/s | s/picture | against one at a time | rounds |\n| --- | --- | --- | --- | --- |")
    for at_once, found in rates.items():
        rate = statistics.median(found)
        ratio = statistics.median(each / one for each, one in zip(found, rates[1], strict=True))
        rounds = ", ".join(f"{each:.3g}" for each in found)
        print(f"| {at_once} | {rate:.3g} | {1 / rate:.3g} | {ratio:.2f} | {rounds} |")


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def load(options: argparse.Namespace) -> DiffusionModel:
    if options.spec:
        from models.specs import random_model

        return random_model(options.spec, options.dtype, options.device)
    from models.diffusion.loading import load_model

    folder = options.cache_dir or ModelSettings().cache_dir
    return load_model(options.model, dtype=options.dtype, device=options.device, cache_dir=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("overhead", "throughput"):
        command = commands.add_parser(name)
        command.add_argument("--device", default=default_device)
        if name == "overhead":
            command.add_argument("--batch", type=int, default=8)
            command.add_argument("--ticks", type=int, default=150)
            continue
        source = command.add_mutually_exclusive_group()
        source.add_argument("--model", default="default", help="bundle, diffusers folder or hub id")
        source.add_argument("--spec", help="a model of models/specs.py with random weights")
        command.add_argument("--dtype", default="auto")
        command.add_argument("--size", help="WIDTHxHEIGHT")
        command.add_argument("--steps", type=int)
        command.add_argument("--guidance", type=float)
        command.add_argument("--sampler")
        command.add_argument("--pictures", type=int, default=8)
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--cache-dir", type=Path)
    options = parser.parse_args()
    if options.command == "throughput":
        throughput(load(options), options)
    else:
        overhead(
            torch.device(getattr(options, "device", default_device)),
            getattr(options, "batch", 8),
            getattr(options, "ticks", 150),
        )


if __name__ == "__main__":
    main()
