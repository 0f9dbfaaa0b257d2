"""Forty mixed requests through one engine, each compared with its run alone.

Steps, samplers, guidance and arrival are mixed (seeded); the default bundle in float32. Prints, per sampler, the
largest difference of a pixel between the picture drawn in company and the same picture drawn alone.

    python bench/mixed.py [--requests 40] [--dtype float32]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import numpy as np

from models.diffusion.loading import load_model
from models.diffusion.model import DiffusionModel
from service.config import EngineSettings, ModelSettings
from service.diffusion.admission import resolve
from service.diffusion.engine import DiffusionEngine, NullObserver
from service.diffusion.request import Draft, Image
from service.events import Failed

SAMPLERS = ("lcm", "ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde")
THINGS = ("apple", "cat", "rocket", "owl", "pizza", "frog", "castle", "bicycle")
COLOURS = ("blue", "green", "yellow", "purple", "white")


class Ticks(NullObserver):
    """How full the ticks were."""

    def __init__(self) -> None:
        self.pictures: list[int] = []

    def tick(self, pictures: int, evaluations: int, seconds: float) -> None:
        self.pictures.append(pictures)


def drafts(count: int) -> list[Draft]:
    rng = random.Random(7)
    return [
        Draft(
            prompt=f"a {rng.choice(THINGS)} on a {rng.choice(COLOURS)} background",
            seed=1000 + number,
            sampler=SAMPLERS[number % len(SAMPLERS)],
            num_inference_steps=rng.randint(1, 8),
            guidance_scale=rng.choice((1.0, 2.0, 3.0, 4.5)),
        )
        for number in range(count)
    ]


def draw(model: DiffusionModel, wanted: Sequence[Draft], arrivals: Sequence[int], ticks: Ticks) -> list[np.ndarray]:
    """Draw the drafts, draft i added before step arrivals[i]."""
    settings = EngineSettings()
    engine = DiffusionEngine(model, settings, ticks)
    pictures: dict[int, np.ndarray] = {}
    step = 0
    while len(pictures) < len(wanted):
        for number, draft in enumerate(wanted):
            if arrivals[number] == step:
                engine.add(resolve(draft, model.card, settings, id=str(number), random_seed=0))
        for event in engine.step():
            if isinstance(event, Failed):
                raise SystemExit(f"{wanted[int(event.request_id)]}: {event.error}")
            if isinstance(event, Image):
                pictures[int(event.request_id)] = np.asarray(event.pixels)
        step += 1
    return [pictures[number] for number in range(len(wanted))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    model = load_model("default", dtype=args.dtype, cache_dir=ModelSettings().cache_dir)
    wanted = drafts(args.requests)
    rng = random.Random(8)
    ticks = Ticks()
    together = draw(model, wanted, [rng.randint(0, args.requests // 2) for _ in wanted], ticks)
    worst: dict[str, list[int]] = {sampler: [] for sampler in SAMPLERS}
    for draft, picture in zip(wanted, together, strict=True):
        (alone,) = draw(model, [draft], [0], Ticks())
        worst[str(draft.sampler)].append(int(np.abs(alone.astype(int) - picture.astype(int)).max()))
    print(
        f"{len(wanted)} requests, {args.dtype}, {len(ticks.pictures)} ticks of "
        f"{min(ticks.pictures)} to {max(ticks.pictures)} pictures, {np.mean(ticks.pictures):.1f} on average\n"
    )
    print("| sampler | pictures | largest difference to the solo run, of 255 |\n| --- | --- | --- |")
    for sampler, differences in worst.items():
        print(f"| {sampler} | {len(differences)} | {max(differences)} |")


if __name__ == "__main__":
    main()
