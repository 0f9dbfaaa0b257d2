"""Contact sheets: the same prompts drawn by each sampler, for people to look at."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

Draw = Callable[[torch.Tensor], torch.Tensor]


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


def draw_sheets(samplers: Mapping[str, Draw], states: torch.Tensor, folder: Path) -> None:
    """One sheet for each sampler, of the prompts with these text states [B, LENGTH, width]."""
    for name, draw in samplers.items():
        save_sheet(draw(states), folder / f"{name}.webp")
