"""A picture grid: source, target from scratch, and the target from the source's latent at each K.

python bench/cache_grid.py [--sampler ddim] [-o out/cache-grid.png]

A row a pair of prompts, from the same prompt under another seed to one that has nothing in common; the target's seed is
not the source's. Prints the scorer's score of every picture, a source's with its own prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PillowImage
from PIL import ImageDraw

from models.diffusion.loading import load_model
from service.calibration.drawing import DECODED_AT_ONCE, Drawing
from service.calibration.measuring import families
from service.config import ModelSettings
from service.evaluation.material import open_material

PAIRS = [
    ("a red apple on a blue background", "a red apple on a blue background"),
    ("a red apple on a blue background", "a picture of a red apple, blue background"),
    ("a cat on a yellow background, 3d style", "a cat on a mint background, 3d style"),
    ("a cat on a yellow background, 3d style", "a cat on a yellow background, flat style"),
    ("a cat on a yellow background, 3d style", "a dog on a yellow background, 3d style"),
    ("a rocket on a navy to purple gradient", "a rocket on a red to orange gradient"),
    ("a strawberry on a green background", "a lemon on a pink background"),
    ("a whale on a teal background", "a castle on a black background, 3d style"),
]
SEED, SECOND_SEED = 1, 1_000_004
CAPTION = 28  # pixels of a line of words


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, help="default: 50 of ddim, else the sampler's own; K is of these")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="of those that the file lists")
    parser.add_argument("--batch", type=int, default=16, help="pictures of one network call")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/cache-grid.png"))
    options = parser.parse_args()
    settings = ModelSettings(model=options.model, device=options.device, dtype=options.dtype)
    scorer = open_material(settings, limit=1).scorer
    model = load_model(options.model, dtype=options.dtype, device=options.device, cache_dir=settings.cache_dir)
    family = next(each for each in families(model.card) if each.sampler == options.sampler)
    steps = options.steps or family.steps
    rows = sorted({round(row * steps / family.steps) for row in family.rows})
    drawing = Drawing(model, options.sampler, steps, options.batch)
    firsts, seconds = (
        [{"prompt": pair[side], "seed": seed} for pair in PAIRS[: options.pairs]]
        for side, seed in ((0, SEED), (1, SECOND_SEED))
    )
    latents = drawing.run(firsts, drawing.noise(firsts), 0, keep=rows)
    columns = {"source": latents[steps], "from scratch": drawing.run(seconds, drawing.noise(seconds), 0)[steps]}
    columns |= {f"K = {row}": drawing.run(seconds, latents[row], row)[steps] for row in rows}
    ends = [scorer.embed_text([record["prompt"] for record in records]) for records in (firsts, seconds)]
    cosines = (ends[0] * ends[1]).sum(1).tolist()
    pictures, scores = {}, {}
    for name, drawn in columns.items():
        pictures[name] = torch.cat([model.decode(part) for part in drawn.split(DECODED_AT_ONCE)]).cpu()
        asked = firsts if name == "source" else seconds
        reading = scorer.read(pictures[name].permute(0, 3, 1, 2).float() / 127.5 - 1)
        words = scorer.embed_text([record["prompt"] for record in asked])
        scores[name] = (reading.embedding * words).sum(1).tolist()
    print("| source | target | similarity | " + " | ".join(columns) + " |\n|" + " --- |" * (3 + len(columns)))
    for pair, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        cells = [f"{scores[name][pair]:.2f}" for name in columns]
        print(f"| {first['prompt']} | {second['prompt']} | {cosines[pair]:.2f} | " + " | ".join(cells) + " |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures, PAIRS, cosines).save(options.output, optimize=True)
    print(f"\n{len(firsts)} rows of {len(columns)} pictures in {options.output}")


def sheet(pictures: dict[str, torch.Tensor], prompts: list[tuple[str, str]], cosines: list[float]) -> PillowImage.Image:
    """Columns by name, each [N, H, W, 3] uint8, at half their size, a line of words above each row of them."""
    count, height, width, _ = next(iter(pictures.values())).shape
    wide, high = width // 2, height // 2
    canvas = PillowImage.new("RGB", (wide * len(pictures), CAPTION + count * (high + CAPTION)), "white")
    words = ImageDraw.Draw(canvas)
    for column, (name, drawn) in enumerate(pictures.items()):
        words.text((column * wide + 4, 8), name, fill="black")
        for row, pixels in enumerate(drawn):
            small = PillowImage.fromarray(np.asarray(pixels)).resize((wide, high), PillowImage.Resampling.LANCZOS)
            canvas.paste(small, (column * wide, 2 * CAPTION + row * (high + CAPTION)))
    for row, ((source, target), cosine) in enumerate(zip(prompts, cosines, strict=False)):
        line = f"{source}  ->  {target}   (similarity {cosine:.2f})"
        words.text((4, CAPTION + row * (high + CAPTION) + 10), line, fill="black")
    return canvas


if __name__ == "__main__":
    main()
