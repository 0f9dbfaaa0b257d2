"""Headstart's engine against the stock diffusers pipeline on the same weights, on this machine, in one run.

First the pictures: the same prompts, the same initial latents, float32, PSNR between the two. Then the clock: the stock
pipeline drawing one picture after another against the engine with 1 and with `--at-once` pictures in flight, each in
float32 and in bfloat16, so that what batching gives and what the dtype gives stand apart. The contenders take turns
round by round; the ratio is the median of the rounds' ratios.

    python bench/stock.py [--model default] [--steps 10] [--guidance 3] [--rounds 3] [--at-once 8]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from drawing import PROMPTS, draw

from accel.samplers.noise import gaussian
from models.bundles import registry
from models.diffusion.loading import load_model
from models.diffusion.model import DiffusionModel, ModelCard
from service.config import EngineSettings, ModelSettings
from service.diffusion.admission import resolve
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import Draft


def pictures(engine: DiffusionEngine, card: ModelCard, drafts: list[Draft], at_once: int) -> list[np.ndarray]:
    """The drafts drawn with at most `at_once` in the engine, in their order."""
    requests = [resolve(draft, card, EngineSettings(), id=str(i), random_seed=0) for i, draft in enumerate(drafts)]
    return [np.asarray(image.pixels) for image in draw(engine, requests, at_once)]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean())
    return 99.0 if error == 0 else 10 * float(np.log10(255.0**2 / error))


def stock_pipeline(folder: Path, dtype: torch.dtype) -> Callable[[Draft, DiffusionModel], np.ndarray]:
    """The stock pipeline, set up as its documentation says, as a function of one request."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
        )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def run(draft: Draft, model: DiffusionModel) -> np.ndarray:
        shape = (model.card.latent_channels, draft.height // model.card.scale, draft.width // model.card.scale)
        latents = gaussian(torch.tensor([draft.seed]), -1, shape, torch.device("cpu")).to(dtype)
        return np.asarray(
            pipe(
                draft.prompt,
                num_inference_steps=draft.num_inference_steps,
                guidance_scale=draft.guidance_scale,
                latents=latents,
                output_type="pil",
            ).images[0]
        )

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=8)
    args = parser.parse_args()
    cache_dir = ModelSettings().cache_dir
    folder = Path(args.model) if Path(args.model).is_dir() else registry.bundle_path(args.model, cache_dir)

    def request(number: int) -> Draft:
        return Draft(
            prompt=PROMPTS[number % len(PROMPTS)], seed=100 + number, sampler="ddim", width=256, height=256,
            num_inference_steps=args.steps, guidance_scale=args.guidance,
        )  # fmt: skip

    drafts = [request(i) for i in range(args.at_once)]
    contenders: dict[str, Callable[[list[Draft]], list[np.ndarray]]] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_model(args.model, dtype=name, cache_dir=cache_dir)
        engine = DiffusionEngine(model, EngineSettings(max_batch=2 * args.at_once))
        stock = stock_pipeline(folder, dtype)
        contenders[f"stock pipeline, one at a time, {name}"] = lambda d, s=stock, m=model: [s(x, m) for x in d]
        contenders[f"engine, one at a time, {name}"] = lambda d, e=engine, c=model.card: pictures(e, c, d, 1)
        contenders[f"engine, {args.at_once} at once, {name}"] = lambda d, e=engine, c=model.card: pictures(
            e, c, d, args.at_once
        )

    for run in contenders.values():
        run(drafts[:1])
    ours, theirs = (contenders[k](drafts) for k in (f"engine, {args.at_once} at once, float32", next(iter(contenders))))
    print("| picture | PSNR to the stock pipeline, dB | largest difference of 255 |\n| --- | --- | --- |")
    for draft, a, b in zip(drafts, ours, theirs, strict=True):
        print(f"| {draft.prompt} | {psnr(a, b):.1f} | {np.abs(a.astype(int) - b.astype(int)).max()} |")

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run(drafts)
            seconds[name].append((time.perf_counter() - started) / len(drafts))
    first, second = (f"stock pipeline, one at a time, {n}" for n in ("float32", "bfloat16"))
    print(f"\nDDIM, {args.steps} steps, guidance {args.guidance}, 256x256, {torch.get_num_threads()} threads\n")
    print("| contender | s per picture | throughput to stock float32 | throughput to stock bfloat16 |")
    print("| --- | --- | --- | --- |")
    for name, values in seconds.items():
        ratios = [
            statistics.median([base / own for base, own in zip(seconds[b], values, strict=True)])
            for b in (first, second)
        ]
        print(f"| {name} | {statistics.median(values):.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
