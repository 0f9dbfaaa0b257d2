"""Contact sheets, for people to look at."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


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
