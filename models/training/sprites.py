"""Sprites: fetched as SVG from npm packages, rendered once to RGBA, kept as WebP in one zip."""

import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from models.training.concepts import STYLES, Concept

PACKAGES = {"3d": ("fluent-emoji", "1.2.7"), "flat": ("fluent-emoji-flat", "1.2.6")}
SIZE = 256
_QUALITY = 92


def _archive(data: Path, style: str) -> Path:
    """The package's .tgz under `data`, fetched with npm when absent."""
    name, version = PACKAGES[style]
    path = data / f"iconify-json-{name}-{version}.tgz"
    if not path.exists():
        subprocess.run(["npm", "pack", f"@iconify-json/{name}@{version}"], cwd=data, check=True, capture_output=True)
    return path


def _icons(archive: Path) -> dict[str, str]:
    """Icon name to whole SVG text."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise ValueError(f"{archive}: package/icons.json is not a file")
        table = json.load(member)
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {} {}">'
    out = {}
    for name, icon in table["icons"].items():
        width, height = (icon.get(side, table.get(side, 16)) for side in ("width", "height"))
        out[name] = head.format(width, height) + icon["body"] + "</svg>"
    return out


def _render(svg: str) -> bytes:
    """One SVG as lossy WebP of SIZE x SIZE with alpha."""
    import resvg_py  # needed only where sprites are made, not where they are used

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    out = io.BytesIO()
    canvas.save(out, "WEBP", quality=_QUALITY, alpha_quality=100, method=4)
    return out.getvalue()


def make_pack(data: Path, concepts: Sequence[Concept]) -> Path:
    """Render every concept in every style into `data`/sprites.zip, unless it is there; return its path."""
    path = data / "sprites.zip"
    names = [f"{style}/{concept.icon}.webp" for style in STYLES for concept in concepts]
    if path.exists() and set(names) <= set(zipfile.ZipFile(path).namelist()):
        return path
    icons = {style: _icons(_archive(data, style)) for style in STYLES}
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as pack:
        for style in STYLES:
            for concept in concepts:
                pack.writestr(f"{style}/{concept.icon}.webp", _render(icons[style][concept.icon]))
    partial.replace(path)
    return path


def load_pack(path: Path, concepts: Sequence[Concept]) -> np.ndarray:
    """Straight-alpha RGBA, uint8 [styles, concepts, SIZE, SIZE, 4]."""
    with zipfile.ZipFile(path) as pack:
        coded = [pack.read(f"{style}/{concept.icon}.webp") for style in STYLES for concept in concepts]

    def decode(blob: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(blob)).convert("RGBA"))

    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(decode, coded))
    return np.stack(pictures).reshape(len(STYLES), len(concepts), SIZE, SIZE, 4)


_SHAPE_COLOURS = ("#dc322f", "#3c6edc", "#fad746", "#8c8c91", "#46aa5a", "#f58c28", "#f596be", "#c8dcf0")


def draw_shapes(concepts: Sequence[Concept], size: int) -> np.ndarray:
    """Simple shapes in the layout of `load_pack`, for runs in miniature: a colour and a corner count per concept."""
    out = np.zeros((len(STYLES), len(concepts), size, size, 4), np.uint8)
    for style in range(len(STYLES)):
        for index in range(len(concepts)):
            picture = Image.new("RGBA", (size, size))
            brush = ImageDraw.Draw(picture)
            outline = "#202020" if style else None
            circle = (size / 2, size / 2, size * 0.45)
            brush.regular_polygon(circle, 3 + index, fill=_SHAPE_COLOURS[index % 8], outline=outline, width=3)
            out[style, index] = np.asarray(picture)
    return out
