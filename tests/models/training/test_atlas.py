"""The atlas: sprites drawn at any place, size and turn, without aliasing and without their neighbours."""

import math

import pytest
import torch

from models.training.atlas import Atlas

CPU = torch.device("cpu")


def drawn(
    pixels: torch.Tensor, side: int, place: tuple[float, ...], turn: float = 0.0, mirror: bool = False
) -> torch.Tensor:
    """One sprite's picture [4, `side`, `side`]."""
    atlas = Atlas(pixels[None], CPU)
    row = torch.zeros(1, dtype=torch.long)
    return atlas.draw(row, torch.tensor([place]), torch.tensor([turn]), torch.tensor([mirror]), side)[0]


@pytest.fixture
def quarters() -> torch.Tensor:
    """A sprite of side 64: red, green, blue and clear quarters, row by row."""
    pixels = torch.zeros(64, 64, 4, dtype=torch.uint8)
    pixels[..., 3] = 255
    pixels[:32, :32, 0] = pixels[:32, 32:, 1] = pixels[32:, :32, 2] = 255
    pixels[32:, 32:, 3] = 0
    return pixels


def test_at_its_own_size_a_sprite_is_itself(quarters: torch.Tensor) -> None:
    picture = drawn(quarters, 64, (0.0, 0.0, 1.0))
    straight = quarters.permute(2, 0, 1).float() / 255
    torch.testing.assert_close(picture[:, 1:-1, 1:-1], straight[:, 1:-1, 1:-1], atol=0.01, rtol=0)


def test_turning_is_clockwise_and_mirroring_exchanges_left_and_right(quarters: torch.Tensor) -> None:
    turned = drawn(quarters, 64, (0.0, 0.0, 1.0), turn=math.pi / 2)
    assert turned[0, 16, 48] > 0.9  # red went from the upper left to the upper right
    mirrored = drawn(quarters, 64, (0.0, 0.0, 1.0), mirror=True)
    assert mirrored[0, 16, 48] > 0.9
    assert mirrored[1, 16, 16] > 0.9


def test_a_place_is_where_the_sprite_is_drawn_and_nothing_else_is(quarters: torch.Tensor) -> None:
    alpha = drawn(quarters, 128, (0.5, -0.5, 0.25))[3]
    assert alpha[16:48, 80:112].sum() == pytest.approx(alpha.sum().item())
    assert alpha.sum().item() == pytest.approx(0.75 * 32**2, rel=0.05)
    assert not drawn(quarters, 128, (0.0, 0.0, 0.0)).any()


@pytest.mark.parametrize("scale", [0.9, 0.5, 0.22, 0.13])
def test_a_fine_pattern_made_small_is_evenly_gray(scale: float) -> None:
    pixels = torch.full((64, 64, 4), 255, dtype=torch.uint8)
    pixels[::2, :, :3] = 0
    picture = drawn(pixels, 32, (0.0, 0.0, scale))
    inside = picture[0][picture[3] > 0.99]
    assert inside.std() < 0.05
    assert inside.mean().item() == pytest.approx(0.5, abs=0.03)


def test_extent_and_typical_brightness_of_a_drawing() -> None:
    pixels = torch.zeros(64, 64, 4, dtype=torch.uint8)
    pixels[16:56, 8:56] = torch.tensor([128, 128, 128, 255], dtype=torch.uint8)
    pixels[8:16, 8:12] = 255  # an ear
    atlas = Atlas(pixels[None], CPU)
    assert atlas.extent[0].tolist() == [-0.75, -0.5, 0.75]
    assert atlas.knee[0].item() == pytest.approx(0.5, abs=0.01)
