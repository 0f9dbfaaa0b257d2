"""The sheet of docs/sheet.png: 32 prompts, seed = position, no choosing, drawn by the default bundle.

python bench/sheet.py [--sampler ddim] [--steps 50] [-o docs/sheet.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from drawing import draw
from PIL import Image as PillowImage

from models.diffusion.loading import load_model
from service.config import EngineSettings, ModelSettings
from service.diffusion.admission import resolve
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import Draft

PROMPTS = [
    "a red apple on a blue background",
    "3d cat on a yellow background",
    "a kitty on a mint background",
    "flat dog on a white background",
    "three 3d crowns on a purple background",
    "two flat penguins on a sky blue background",
    "a rocket on a navy to purple gradient",
    "an emoji of a frog with a pink background",
    "small 3d fox on a green background",
    "a big hamburger on a red background",
    "flat robot to the right of a tree on a beige to mint gradient",
    "a 3d guitar next to a rose on a gray background",
    "an octopus on a teal background",
    "a castle on a purple to pink gradient",
    "strawberry",
    "a ufo on a black background",
    "a snowman on a light blue background",
    "a bicycle on a mint background, flat style",
    "a birthday cake, pink background",
    "an owl on a brown background",
    "a green frog and a red apple on a white background",
    "a sunflower on a sky blue to green gradient",
    "a pizza on a green background",
    "a 3d dragon on a black background",
    "a blue heart on a red background",
    "automobile on orange",
    "a spaceship on navy",
    "a cactus on a beige background",
    "a whale on a teal background",
    "a picture of two cats on green",
    "a lemon on a purple background",
    "a teddy bear on a yellow background",
]
COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler")
    parser.add_argument("--steps", type=int)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/sheet.png"))
    args = parser.parse_args()
    model = load_model("default", cache_dir=ModelSettings().cache_dir)
    settings = EngineSettings()
    engine = DiffusionEngine(model, settings)
    drafts = [
        Draft(prompt=prompt, seed=seed, sampler=args.sampler, num_inference_steps=args.steps)
        for seed, prompt in enumerate(PROMPTS)
    ]
    requests = [resolve(draft, model.card, settings, id=str(i), random_seed=0) for i, draft in enumerate(drafts)]
    width, height = model.card.default_size
    sheet = np.zeros((-(-len(PROMPTS) // COLUMNS) * height, COLUMNS * width, 3), np.uint8)
    for number, image in enumerate(draw(engine, requests, len(requests))):
        row, column = divmod(number, COLUMNS)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = image.pixels
    args.output.parent.mkdir(parents=True, exist_ok=True)
    half = (sheet.shape[1] // 2, sheet.shape[0] // 2)
    PillowImage.fromarray(sheet).resize(half, PillowImage.Resampling.LANCZOS).save(args.output, optimize=True)
    print(f"{len(PROMPTS)} pictures in {args.output}")


if __name__ == "__main__":
    main()
