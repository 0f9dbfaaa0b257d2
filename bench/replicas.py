"""Many pictures over several GPUs, each drawn whole by one of them, against one GPU.

The same requests are drawn by one rank and by N: pictures a second, and the largest difference of a pixel between the
two. The engine, its batches and the ways between the ranks are those of `headstart serve --gpus N`. On the CPU each
rank has one thread, and a tiny random model stands for a model unless one is named.

    python bench/replicas.py [--gpus 2 4] [--requests 32] [--steps 8]
    python bench/replicas.py --device cuda --gpus 2 4 --model default --size 256x256 --requests 256 --at-once 64
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from drawing import draw
from timing import print_table

from models.diffusion.loaded import LoadedModel
from models.diffusion.loading import load_model
from service.config import EngineSettings, ModelSettings, RankSettings, Settings
from service.diffusion.admission import resolve
from service.diffusion.engine import DiffusionEngine
from service.diffusion.ranks import Ranks, get_ready, open_ranks
from service.diffusion.request import Draft, Image, ImageRequest, parse_size
from tests import tiny


def timed(
    model: LoadedModel, settings: Settings, requests: Sequence[ImageRequest], ranks: Ranks | None
) -> tuple[float, list[Image]]:
    """Seconds and pictures; the first few are drawn once before."""
    engine = DiffusionEngine(model, settings.engine, ranks=ranks)
    draw(engine, requests[: settings.engine.max_batch], settings.engine.max_running)
    begun = time.perf_counter()
    images = draw(engine, requests, settings.engine.max_running)
    return time.perf_counter() - begun, images


def worst(ones: Sequence[Image], others: Sequence[Image]) -> int:
    pairs = zip(ones, others, strict=True)
    return max(int(np.abs(np.subtract(one.pixels, other.pixels, dtype=np.int16)).max()) for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="default: a tiny random one")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--sampler")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=16, help="pictures of one batch, and pictures that run")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
        get_ready(ModelSettings(device="cpu"), RankSettings(gpus=2))
    source = args.model or str(tiny.sd(Path(tempfile.mkdtemp()) / "tiny"))
    chosen = ModelSettings(model=source, device=args.device, dtype=args.dtype if args.model else "float32")
    model = load_model(source, device=args.device, dtype=chosen.dtype, cache_dir=chosen.cache_dir)
    width, height = parse_size("--size", args.size, "WIDTHxHEIGHT")
    limits = EngineSettings(max_batch=2 * args.at_once, max_running=args.at_once, max_pixels=width * height)
    requests = [
        resolve(
            Draft(
                prompt=f"a red fox number {number}",
                seed=number,
                width=width,
                height=height,
                num_inference_steps=args.steps,
                sampler=args.sampler,
            ),
            model.card,
            limits,
            id=str(number),
            random_seed=0,
        )
        for number in range(args.requests)
    ]
    alone, expected = timed(model, Settings(engine=limits), requests, None)
    rows = [["1", f"{len(requests) / alone:.2f}", "1.00", "0"]]
    for gpus in args.gpus:
        settings = Settings(model=chosen, engine=limits, ranks=RankSettings(gpus=gpus, patch_degree="1"))
        ranks, _ = open_ranks(model, settings)
        assert ranks is not None
        seconds, images = timed(model, settings, requests, ranks)
        ranks.close()
        rows.append(
            [str(gpus), f"{len(requests) / seconds:.2f}", f"{alone / seconds:.2f}", str(worst(expected, images))]
        )
    request = requests[0]
    print(f"\n{model.card.name}, {model.dtype}, {args.size}, {request.sampler}, {request.steps} steps, {args.device}")
    print_table(["ranks", "pictures/s", "times one", "largest difference, of 255"], rows)


if __name__ == "__main__":
    main()
