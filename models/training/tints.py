"""Tints: an object drawn in another colour, its shading, highlights and outlines kept.

Shapes: B sprites; H, W their sides; T tints, natural (0) first.
"""

import torch

from models.training.concepts import TINTS

# For each tint the colour of the darkest, the typical and the brightest part of a sprite, in sRGB.
RAMPS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((70, 4, 14), (222, 40, 40), (255, 190, 180)),
    "orange": ((104, 34, 0), (250, 132, 20), (255, 222, 170)),
    "yellow": ((120, 72, 0), (255, 214, 40), (255, 250, 205)),
    "green": ((6, 54, 26), (48, 168, 74), (200, 245, 200)),
    "blue": ((8, 22, 84), (44, 104, 228), (190, 220, 255)),
    "purple": ((40, 10, 76), (136, 66, 200), (228, 200, 255)),
    "pink": ((116, 24, 74), (248, 130, 186), (255, 224, 240)),
    "gray": ((38, 38, 42), (140, 140, 146), (228, 228, 232)),
}
_LIGHTEST = 0.3  # how far above the typical brightness the light colour is reached, at least
_NATURAL = ((0, 0, 0), (0, 0, 0), (0, 0, 0))


def ramps(device: torch.device) -> torch.Tensor:
    """Dark, middle and light colours of every tint, [T, 3, 3] in [0, 1]; the natural row is not used."""
    return torch.tensor([_NATURAL, *(RAMPS[name] for name in TINTS)], device=device) / 255


def brightness(colour: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] of premultiplied [B, 3, H, W]: the mean of mean and maximum, so that blue is not dark."""
    return (colour.mean(1, keepdim=True) + colour.amax(1, keepdim=True)) / 2


def recolour(colour: torch.Tensor, alpha: torch.Tensor, knee: torch.Tensor, ramp: torch.Tensor) -> torch.Tensor:
    """Premultiplied `colour` [B, 3, H, W] mapped by its brightness along `ramp` [B, 3, 3] (dark, middle, light).

    `knee` [B] is the sprite's typical brightness, which becomes the middle colour; brighter parts go towards light,
    darker ones towards dark. Every term is proportional to `alpha` [B, 1, H, W], so nothing is divided by it and soft
    edges stay clean.
    """
    knee = knee[:, None, None, None]
    value = brightness(colour)
    shade = torch.minimum(value / knee, alpha)
    light = (value - knee * alpha).clamp(min=0) / (1 - knee).clamp(min=_LIGHTEST)
    dark, middle, bright = ramp[:, :, :, None, None].unbind(1)
    return dark * alpha + (middle - dark) * shade + (bright - middle) * light
