"""Pixels to picture files that carry their settings, and back to the settings.

PNG holds them in the text chunk `parameters`, in the layout that AUTOMATIC1111's web UI introduced; JPEG and WebP hold
the same text in the EXIF tag UserComment, as UTF-16BE after the character code UNICODE.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from service.errors import SetupError
from service.recipe import Recipe

FORMATS = ("png", "jpeg", "webp")
SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
USER_COMMENT_CODE = b"UNICODE\0"
GAP = 4  # pixels between the pictures of a contact sheet


def encode(pixels: np.ndarray, format: str, quality: int, recipe: Recipe | None = None) -> bytes:
    """A picture file.

    Args:
        pixels: [H, W, 3] uint8.
        format: png, jpeg or webp.
        quality: 0 to 100, for JPEG and WebP; PNG loses nothing and ignores it.
        recipe: the settings to embed.
    """
    picture = Image.fromarray(pixels)
    options: dict[str, Any] = {}
    if format == "png":
        if recipe is not None:
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_text("parameters", recipe.to_text())
    else:
        options["quality"] = quality
        if recipe is not None:
            options["exif"] = _exif(recipe.to_text())
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def contact_sheet(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one size, each [H, W, 3] uint8, on a white grid that is about as wide as it is high."""
    height, width, _ = pictures[0].shape
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def read_recipe(path: Path) -> Recipe:
    """The settings that a picture file carries.

    Raises:
        SetupError: the file cannot be read, is no picture, or carries no settings.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            text = picture.info.get("parameters") if picture.format == "PNG" else _user_comment(picture)
    except UnidentifiedImageError:
        raise SetupError(f"{path}: not a picture; PNG, JPEG and WebP can be shown") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SetupError(f"{path}: cannot be read: {reason}") from None
    if not text:
        raise SetupError(f"{path}: carries no settings")
    return Recipe.from_text(text)


def _exif(text: str) -> Image.Exif:
    exif = Image.Exif()
    exif.endian = ">"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = USER_COMMENT_CODE + text.encode("utf-16-be")
    return exif


def _user_comment(picture: Image.Image) -> str | None:
    comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(USER_COMMENT_CODE):
        return None
    return comment.removeprefix(USER_COMMENT_CODE).decode("utf-16-be")
