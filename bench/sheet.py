"""The sheets of docs/: the recipe's 64 prompts, seed = position, no choosing, each drawn by every run asked for.

    python bench/sheet.py [--runs ddim:50 lcm:4] [--first 64] [-o docs/sheet.webp]

A run is SAMPLER:STEPS, at the model's own guidance for that sampler. A cell has a prompt's pictures in the order of the
runs, side by side, and the prompt below them.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from drawing import draw
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from models.diffusion.loading import load_model
from models.training.prompts import SHEET_PROMPTS
from service.config import EngineSettings, ModelSettings
from service.diffusion.admission import resolve
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import Draft, Image

WIDTH = 1600  # pixels at most, of a sheet
SIDE = 192  # pixels at most, of a picture on it
GAP = 6
FONT = 13


def parse_run(text: str) -> tuple[str, int]:
    """("ddim", 50) of "ddim:50"."""
    sampler, _, steps = text.partition(":")
    if not sampler or not steps.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; SAMPLER:STEPS, such as ddim:50")
    return sampler, int(steps)


def make_sheet(prompts: Sequence[str], pictures: Sequence[Sequence[np.ndarray]], title: str) -> PillowImage.Image:
    """A sheet of cells.

    Args:
        pictures: of each run, one a prompt, [H, W, 3] uint8.
    """
    font = ImageFont.load_default(FONT)
    columns = max(1, (WIDTH - GAP) // (len(pictures) * SIDE + 2 * GAP))
    columns = min(columns, len(prompts))
    inner = len(pictures) * SIDE
    letters = int(inner / font.getlength("mi") * 2)  # in a line of a label, of the mean width
    labels = [textwrap.wrap(prompt, letters) for prompt in prompts]
    line = FONT + 3
    height = SIDE + line * max(map(len, labels)) + 2 * GAP
    rows = -(-len(prompts) // columns)
    head = line + 2 * GAP
    sheet = PillowImage.new("RGB", (columns * (inner + 2 * GAP) + GAP, head + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, fill="black", font=font)
    for number, label in enumerate(labels):
        left = GAP + number % columns * (inner + 2 * GAP)
        top = head + number // columns * height
        for run, drawn in enumerate(pictures):
            tile = PillowImage.fromarray(drawn[number]).resize((SIDE, SIDE), PillowImage.Resampling.LANCZOS)
            sheet.paste(tile, (left + run * SIDE, top))
        for index, text in enumerate(label):
            pen.text((left, top + SIDE + 2 + index * line), text, fill="black", font=font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--runs", nargs="+", type=parse_run, default=[("lcm", 4)], metavar="SAMPLER:STEPS")
    parser.add_argument("--first", type=int, default=len(SHEET_PROMPTS), help="so many prompts, from the first on")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/sheet.webp"))
    args = parser.parse_args()
    if not 1 <= args.first <= len(SHEET_PROMPTS):
        parser.error(f"--first: {args.first} is not allowed; 1 to {len(SHEET_PROMPTS)}")
    prompts = SHEET_PROMPTS[: args.first]
    model = load_model(args.model, cache_dir=ModelSettings().cache_dir)
    settings = EngineSettings()
    pictures = []
    for sampler, steps in args.runs:
        engine = DiffusionEngine(model, settings)
        drafts = [
            Draft(prompt=prompt, seed=seed, sampler=sampler, num_inference_steps=steps)
            for seed, prompt in enumerate(prompts)
        ]
        requests = [resolve(draft, model.card, settings, id=str(i), random_seed=0) for i, draft in enumerate(drafts)]
        images: list[Image] = draw(engine, requests, settings.max_running)
        pictures.append([np.asarray(image.pixels) for image in images])
    told = ", ".join(f"{sampler} at {steps} steps" for sampler, steps in args.runs)
    title = f"{model.card.name}: {told}, left to right; seeds 0 to {len(prompts) - 1}"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 90} if args.output.suffix == ".webp" else {"optimize": True}
    make_sheet(prompts, pictures, title).save(args.output, **options)
    print(f"{len(args.runs)} pictures of each of {len(prompts)} prompts in {args.output}")


if __name__ == "__main__":
    main()
