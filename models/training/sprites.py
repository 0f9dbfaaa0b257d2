"""Sprites: fetched as SVG from npm packages, rendered once to RGBA, kept as WebP in one zip."""

import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from models.training.concepts import STYLES, Concept

PACKAGES = {
    "3d": ("fluent-emoji", "1.2.7"),
    "flat": ("fluent-emoji-flat", "1.2.6"),
    "noto": ("noto", "1.2.9"),
    "twemoji": ("twemoji", "1.2.5"),
}
SIZE = 384
_PROBE = 96  # a sprite's extent is measured on a drawing of this many pixels a side
_MARGIN = 0.02
_VISIBLE = 16  # alpha of 255 below which a pixel does not count towards the extent
_QUALITY = 80
_MORE = (0, 16, 48, 112, 200)  # pixels: resvg's filters panic at some sizes, one icon in some thousands


@dataclass(frozen=True)
class SpritePack:
    """Every drawing of some concepts.

    `pixels`: uint8 [R, side, side, 4], straight-alpha RGBA. `rows`: int64 [N, STYLES, V], the rows of `pixels` that
    draw concept n in a style, repeated cyclically up to V; all 0 where there is none. `counts`: int64 [N, STYLES], how
    many of them differ.
    """

    pixels: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor


def archive(data: Path, style: str) -> Path:
    """The package's .tgz under `data`, fetched with npm when absent."""
    name, version = PACKAGES[style]
    path = data / f"iconify-json-{name}-{version}.tgz"
    if not path.exists():
        subprocess.run(["npm", "pack", f"@iconify-json/{name}@{version}"], cwd=data, check=True, capture_output=True)
    return path


@dataclass(frozen=True)
class _Icon:
    """The inside of an SVG element, and its left, top, width and height."""

    body: str
    box: tuple[float, float, float, float]

    def svg(self, box: tuple[float, float, float, float] | None = None) -> str:
        """The whole SVG text; with `box`, showing that part."""
        view = " ".join(str(number) for number in box or self.box)
        namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {namespaces} viewBox="{view}">{self.body}</svg>'


def _icons(archive: Path) -> dict[str, _Icon]:
    """Every icon of a package by name, plain aliases among them."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise ValueError(f"{archive}: package/icons.json is not a file")
        table: dict[str, Any] = json.load(member)

    def icon(entry: dict[str, Any]) -> _Icon:
        left, top = entry.get("left", 0), entry.get("top", 0)
        width, height = (entry.get(side, table.get(side, 16)) for side in ("width", "height"))
        return _Icon(entry["body"], (left, top, width, height))

    out = {name: icon(entry) for name, entry in table["icons"].items()}
    # Aliases that turn or mirror their parent are left out: a scene turns and mirrors by itself.
    aliases = {name: entry["parent"] for name, entry in table.get("aliases", {}).items() if len(entry) == 1}
    while ready := [name for name, parent in aliases.items() if parent in out]:
        out |= {name: out[aliases.pop(name)] for name in ready}
    return out


def _draw(svg: str, side: int) -> Image.Image:
    """RGBA of `side` x `side`. Raises ValueError where the renderer cannot draw it."""
    import resvg_py  # needed only where sprites are made, not where they are used

    for more in _MORE:
        try:
            png = bytes(
                resvg_py.svg_to_bytes(svg_string=svg, width=side + more, height=side + more, skip_system_fonts=True)
            )
        except BaseException as error:  # what a panic in Rust arrives as; its class cannot be imported
            if type(error).__name__ != "PanicException":
                raise
            continue
        return Image.open(io.BytesIO(png)).convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    raise ValueError(f"resvg draws this at no size from {side} on: {svg[:200]}")


def _render(icon: _Icon, path: Path) -> None:
    """The icon trimmed to what shows of it, centred in SIZE x SIZE, as WebP with alpha at `path`."""
    left, top, width, height = icon.box
    side = max(width, height)
    unit, corner = side / _PROBE, np.array([left - (side - width) / 2, top - (side - height) / 2])
    alpha = np.asarray(_draw(icon.svg((*corner.tolist(), side, side)), _PROBE))[..., 3] >= _VISIBLE
    columns, rows = np.flatnonzero(alpha.any(0)), np.flatnonzero(alpha.any(1))
    first, last = np.array([columns[0], rows[0]]), np.array([columns[-1], rows[-1]]) + 1
    trimmed = float((last - first).max()) * (1 + 2 * _MARGIN)
    x, y = (corner + (first + last - trimmed) / 2 * unit).tolist()
    picture = _draw(icon.svg((x, y, trimmed * unit, trimmed * unit)), SIZE)
    lossless = path.parent.name in ("flat", "twemoji")  # even areas are smaller so, shaded ones are not
    partial = path.with_suffix(".partial")
    picture.save(partial, "WEBP", lossless=lossless, quality=_QUALITY, alpha_quality=90, method=4)
    partial.replace(path)


def _sprites(concepts: Sequence[Concept]) -> list[tuple[str, str]]:
    """(style, icon) of every drawing: the rows of a pack."""
    return [
        (style, icon)
        for concept in concepts
        for style, own in zip(STYLES, concept.drawings, strict=True)
        for icon in own
    ]


def make_pack(data: Path, concepts: Sequence[Concept]) -> Path:
    """Render every drawing of every concept into `data`/sprites.zip; return its path.

    Drawings rendered before lie in `data`/sprites and are kept. Raises KeyError where a package has no icon of the name
    that the table gives.
    """
    path, folder = data / "sprites.zip", data / "sprites"
    sprites = _sprites(concepts)
    names = [f"{style}/{icon}.webp" for style, icon in sprites]
    if path.exists():
        with zipfile.ZipFile(path) as pack:
            if set(names) == set(pack.namelist()):
                return path
    packages = {style: _icons(archive(data, style)) for style in STYLES}
    for concept in concepts:
        for style, own in zip(STYLES, concept.drawings, strict=True):
            (folder / style).mkdir(parents=True, exist_ok=True)
            for icon in own:
                if icon not in packages[style]:
                    raise KeyError(f"{concept.name}: {'-'.join(PACKAGES[style])} ({style}) has no icon {icon}")
    missing = [(packages[style][icon], folder / style / f"{icon}.webp") for style, icon in sprites]
    missing = [(icon, file) for icon, file in missing if not file.exists()]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_render, *zip(*missing, strict=True), chunksize=16))
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as pack:
        for name in names:
            pack.write(folder / name, name)
    partial.replace(path)
    return path


def _index(concepts: Sequence[Concept]) -> tuple[torch.Tensor, torch.Tensor]:
    """The `rows` and `counts` of a pack whose pixels lie in the order of `_sprites`."""
    counts = torch.tensor([[len(own) for own in concept.drawings] for concept in concepts])
    first = (counts.flatten().cumsum(0) - counts.flatten()).reshape(counts.shape)
    turn = torch.arange(int(counts.max())) % counts.clamp(min=1)[..., None]
    return torch.where(counts[..., None] > 0, first[..., None] + turn, 0), counts


def load_pack(path: Path, concepts: Sequence[Concept]) -> SpritePack:
    """The drawings of these concepts, side SIZE. Raises KeyError where the zip lacks one."""
    sprites = _sprites(concepts)
    pixels = np.empty((len(sprites), SIZE, SIZE, 4), np.uint8)
    with zipfile.ZipFile(path) as pack:
        coded = [pack.read(f"{style}/{icon}.webp") for style, icon in sprites]

    def decode(row: int) -> None:
        pixels[row] = np.asarray(Image.open(io.BytesIO(coded[row])).convert("RGBA"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, range(len(sprites))))
    return SpritePack(torch.from_numpy(pixels), *_index(concepts))


_SHAPE_COLOURS = ("#dc322f", "#3c6edc", "#fad746", "#8c8c91", "#46aa5a", "#f58c28", "#f596be", "#c8dcf0")
_OUTLINES = (None, "#202020", "#ffffff", "#6b3fa0")


def draw_shapes(concepts: Sequence[Concept], size: int) -> SpritePack:
    """Simple shapes for runs in miniature, side `size`: a colour and a corner count per concept, an outline per style.

    Concepts are drawn as often as the table draws them, but at most twice; a second drawing stands on another corner.
    """
    shapes = [replace(concept, drawings=tuple(own[:2] for own in concept.drawings)) for concept in concepts]
    pictures = []
    for index, concept in enumerate(shapes):
        for outline, own in zip(_OUTLINES, concept.drawings, strict=True):
            for drawing in range(len(own)):
                picture = Image.new("RGBA", (size, size))
                circle, corners = (size / 2, size / 2, size * 0.45), 3 + index
                fill = _SHAPE_COLOURS[index % len(_SHAPE_COLOURS)]
                brush = ImageDraw.Draw(picture)
                brush.regular_polygon(circle, corners, drawing * 180 / corners, fill=fill, outline=outline, width=3)
                pictures.append(np.asarray(picture))
    return SpritePack(torch.from_numpy(np.stack(pictures)), *_index(shapes))
