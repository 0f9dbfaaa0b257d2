"""Tints: every sprite comes out in the named colour, with its shading and its soft edges."""

import colorsys

import pytest
import torch

from models.training.concepts import TINTS
from models.training.tints import ramps, recolour

RAMPS = ramps(torch.device("cpu"))


def tinted(gray: torch.Tensor, alpha: float, tint: int, knee: float) -> torch.Tensor:
    """Straight colours [K, 3] of gray levels [K] at this alpha."""
    colour = (gray[:, None, None, None] * alpha).expand(-1, 3, 1, 1)
    out = recolour(
        colour, torch.full((len(gray), 1, 1, 1), alpha), torch.full((len(gray),), knee), RAMPS[[tint] * len(gray)]
    )
    return out[..., 0, 0] / alpha


@pytest.mark.parametrize("knee", [0.15, 0.5, 0.98])
@pytest.mark.parametrize("tint", range(1, len(TINTS) + 1))
def test_the_typical_brightness_becomes_the_named_colour_and_shading_stays(tint: int, knee: float) -> None:
    out = tinted(torch.tensor([0.0, knee / 2, knee, 1.0]), 1.0, tint, knee)
    torch.testing.assert_close(out[2], RAMPS[tint, 1])
    assert (out.sum(1).diff() > 0).all()
    torch.testing.assert_close(out[0], RAMPS[tint, 0])


def test_soft_edges_have_the_colour_of_the_inside() -> None:
    gray = torch.tensor([0.1, 0.4, 0.9])
    torch.testing.assert_close(tinted(gray, 0.3, 5, 0.4), tinted(gray, 1.0, 5, 0.4))


def test_named_colours_differ_in_hue_or_lightness() -> None:
    middles = RAMPS[1:, 1]
    apart = torch.cdist(middles, middles) + torch.eye(len(TINTS)) * 9
    assert apart.min() > 0.25
    hues = {name: colorsys.rgb_to_hsv(*middles[index].tolist())[0] * 360 for index, name in enumerate(TINTS)}
    assert hues["red"] < hues["orange"] < hues["yellow"] < hues["green"] < hues["blue"] < hues["purple"] < hues["pink"]
