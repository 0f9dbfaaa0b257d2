"""Contact sheets: the same prompts drawn by each sampler, for people to look at."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.training.evaluate import LCM_STEPS, Models

PROMPTS = (
    "a red apple on a blue background",
    "a yellow banana on a purple background",
    "a green frog on a pink background",
    "a kitty on a mint background",
    "cute puppy, yellow background",
    "a bunny on green",
    "spaceship on a navy background",
    "an emoji of a frog with a purple background",
    "a picture of two cats on green",
    "3d apple on blue",
    "apple, blue background",
    "flat rocket on a navy to purple gradient",
    "a big hamburger on a red background",
    "three crowns on an orange to yellow gradient",
    "small fox on a green background",
    "a tiny ladybug on white",
    "a cat and a dog on a beige background",
    "a tiger next to a banana on a sky blue background",
    "flat robot to the right of a tree on a beige to mint gradient",
    "a guitar to the left of a rose on a gray background",
    "two flat monkeys on a sky blue background",
    "3 penguins, teal background",
    "a blue heart on a red background",
    "a green book next to a blue book on yellow",
    "a red circle on a white background",
    "ufo on black",
    "flat bicycle on a mint background",
    "a dragon on a black background",
    "snowman on a light blue background",
    "a pizza",
    "strawberry",
    "flat octopus",
    "an owl on a brown background, flat style",
    "on a pink background, a birthday cake",
    "a 3d render of a castle on a purple to pink gradient",
    "astronaut, black background",
    "a burger and fries on yellow",
    "a car on a gray background",
    "automobile on orange",
    "a cup of coffee on a beige background",
    "a smiley face on a blue background",
    "a sad ghost on a purple background",
    "a lighthouse on a blue background",
    "a green car on a white background",
    "a dog wearing a top hat",
    "feline on a blue background",
    "a doggie on grey",
    "sunflower with a sky blue to green gradient background",
)


def save_sheet(pictures: torch.Tensor, path: Path, columns: int = 8, side: int = 192) -> None:
    """Pictures [B, 3, H, H] in [-1, 1] as one WebP."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for index, picture in enumerate(pictures):
        pixels = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        tile = Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (index % columns * side, index // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "WEBP", quality=88)


def draw_sheets(models: Models, folder: Path, seed: int = 1) -> None:
    """One sheet for DDIM-50 at guidance 3 and one for each count of LCM steps at guidance 2, from rank 0."""
    if not models.ranks.main:
        return
    states = models.tower.encode_prompts(PROMPTS)
    save_sheet(models.ddim(3.0, seed)(states), folder / "ddim-50.webp")
    for steps in LCM_STEPS:
        save_sheet(models.lcm(steps, 2.0, seed)(states), folder / f"lcm-{steps}.webp")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
