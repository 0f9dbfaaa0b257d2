from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.errors import SetupError
from service.pictures import GAP, contact_sheet, encode, read_recipe
from service.recipe import Recipe

PIXELS = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)
PROMPTS = ["a fox", 'a "red" fox\non moss', "狐狸 🦊 é", "a\nNegative prompt: b", "x" * 2000, "\x01" * 99]


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_settings_survive_every_format(tmp_path: Path, format: str, prompt: str) -> None:
    recipe = Recipe(prompt, "blur, 霧", {"Steps": "4", "Seed": "7"})
    path = tmp_path / f"fox.{format}"
    path.write_bytes(encode(PIXELS, format, 90, recipe))
    assert read_recipe(path) == recipe
    assert opened(path.read_bytes()).size == (24, 16)


def test_png_loses_nothing_and_quality_buys_bytes() -> None:
    assert np.array_equal(np.asarray(opened(encode(PIXELS, "png", 0))), PIXELS)
    for format in ("jpeg", "webp"):
        assert len(encode(PIXELS, format, 5)) < len(encode(PIXELS, format, 95))


def test_where_other_programs_look() -> None:
    recipe = Recipe("a fox", "", {"Steps": "4"})
    png = opened(encode(PIXELS, "png", 90, recipe))
    assert png.info["parameters"] == "a fox\nSteps: 4"
    jpeg = opened(encode(PIXELS, "jpeg", 90, recipe))
    assert jpeg.getexif().get_ifd(0x8769)[0x9286] == b"UNICODE\0" + "a fox\nSteps: 4".encode("utf-16-be")


def test_pictures_without_settings_and_files_that_are_none(tmp_path: Path) -> None:
    for format in ("png", "jpeg", "webp"):
        (tmp_path / "bare").write_bytes(encode(PIXELS, format, 90))
        with pytest.raises(SetupError, match="carries no settings"):
            read_recipe(tmp_path / "bare")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SetupError, match="not a picture"):
        read_recipe(tmp_path / "text")
    whole = encode(np.zeros((64, 64, 3), np.uint8), "png", 90)
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SetupError, match="cannot be read"):
        read_recipe(tmp_path / "cut")
    with pytest.raises(SetupError, match="No such file"):
        read_recipe(tmp_path / "missing")
    with pytest.raises(SetupError, match="Is a directory"):
        read_recipe(tmp_path)


@pytest.mark.parametrize(("count", "columns", "rows"), [(2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 3, 2), (8, 3, 3)])
def test_contact_sheet(count: int, columns: int, rows: int) -> None:
    pictures = [np.full((16, 24, 3), index, np.uint8) for index in range(count)]
    sheet = contact_sheet(pictures)
    assert sheet.shape == (rows * (16 + GAP) + GAP, columns * (24 + GAP) + GAP, 3)
    for index in range(count):
        top, left = GAP + index // columns * (16 + GAP), GAP + index % columns * (24 + GAP)
        assert (sheet[top : top + 16, left : left + 24] == index).all()
    assert (sheet[:GAP] == 255).all()
