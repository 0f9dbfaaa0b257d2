"""Grounds: what is behind the objects, drawn as functions of the pixel's place, a whole batch at once.

Shapes: B pictures; G grounds; H the picture's side. Coordinates are in half-picture units, y downwards. A ground is
built up in layers: a vertical gradient, a disc (sun or moon), up to three bands with a waved upper edge (hills, waves,
dunes, a table top), and marks over them (stripes, dots, stars, clouds, grains, planks).
"""

import math

import torch

GROUNDS = ("plain", "gradient", "stripes", "dots", "sky and grass", "sea", "night", "sand", "table")
PLAIN, GRADIENT, STRIPES, DOTS, GRASS, SEA, NIGHT, SAND, TABLE = range(len(GROUNDS))
COLOURED = 4  # the first four bear named colours

_BANDS = 3
_CHANCES = 8  # random numbers a picture's ground draws
_NO_BAND = (9.0, 0.0, 1.0, 0.0, (0, 0, 0))
_CLEAR = (0, 0, 0)

# (top, bottom) of the gradient in two moods, between which each picture lies.
_SKIES = {
    GRASS: (((92, 176, 242), (206, 236, 252)), ((130, 200, 245), (232, 246, 250))),
    SEA: (((150, 222, 240), (236, 250, 250)), ((255, 196, 140), (255, 236, 205))),
    NIGHT: (((10, 14, 48), (48, 50, 110)), ((18, 12, 52), (76, 52, 120))),
    SAND: (((255, 214, 150), (255, 240, 205)), ((160, 220, 235), (240, 246, 230))),
    TABLE: (((214, 224, 214), (232, 238, 228)), ((240, 222, 200), (248, 236, 220))),
}
# Bands from back to front: (height of the edge, amplitude, waves across, scalloped, colour).
_LAND = {
    GRASS: ((0.08, 0.07, 0.8, 0, (138, 205, 96)), (0.3, 0.06, 1.1, 0, (104, 184, 76)), _NO_BAND),
    SEA: (
        (-0.12, 0.035, 3.0, 1, (76, 170, 226)),
        (0.22, 0.05, 2.3, 1, (44, 134, 208)),
        (0.58, 0.065, 1.8, 1, (24, 100, 180)),
    ),
    SAND: ((-0.02, 0.09, 0.6, 0, (240, 206, 140)), (0.22, 0.08, 0.9, 0, (228, 186, 114)), _NO_BAND),
    TABLE: ((0.14, 0.0, 1.0, 0, (196, 138, 84)), (0.2, 0.0, 1.0, 0, (168, 108, 60)), _NO_BAND),
}
# (radius of the disc, colour), and the colour of the marks.
_DISCS = {SEA: (0.16, (255, 226, 110)), NIGHT: (0.17, (252, 240, 190)), SAND: (0.14, (255, 176, 66))}
_MARKS = {GRASS: (255, 255, 255), NIGHT: (255, 250, 215), SAND: (196, 150, 84), TABLE: (128, 78, 40)}


def _columns(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[B, K] as K tensors [B, 1, 1]."""
    return values[:, :, None, None].unbind(1)


def _hash(x: torch.Tensor) -> torch.Tensor:
    """Scattered numbers in [0, 1) from moderate ones."""
    return (x.sin() * 4375.85).frac().abs()


class Grounds:
    """The tables of the grounds on a device."""

    def __init__(self, device: torch.device) -> None:
        def colours(rows: object) -> torch.Tensor:
            return torch.tensor(rows, dtype=torch.float32, device=device) / 255

        every = range(len(GROUNDS))
        empty = ((_CLEAR, _CLEAR), (_CLEAR, _CLEAR))
        bands = [_LAND.get(ground, (_NO_BAND,) * _BANDS) for ground in every]
        self._skies = colours([_SKIES.get(ground, empty) for ground in every])
        self._edges = torch.tensor([[band[:4] for band in row] for row in bands], device=device)
        self._land = colours([[band[4] for band in row] for row in bands])
        self._radius = torch.tensor([_DISCS.get(ground, (0.0, _CLEAR))[0] for ground in every], device=device)
        self._disc = colours([_DISCS.get(ground, (0.0, _CLEAR))[1] for ground in every])
        self._marks = colours([_MARKS.get(ground, _CLEAR) for ground in every])

    def draw(
        self, ground: torch.Tensor, top: torch.Tensor, bottom: torch.Tensor, key: torch.Tensor, side: int
    ) -> torch.Tensor:
        """Pictures [B, 3, `side`, `side`] in [0, 1].

        `ground` [B]; `top`, `bottom` [B, 3] the colours of coloured grounds; `key` [B] any numbers, from which follows
        all that varies at random: the same key draws the same ground at every size.
        """
        pixel = 2 / side
        line = (torch.arange(side, device=key.device) + 0.5) * pixel - 1
        x, y = line[None, None, :], line[None, :, None]
        chance = _hash(key[:, None] * 37.7 + torch.arange(_CHANCES, device=key.device) * 1.7)
        mood, phase, drift, shade, *_ = _columns(chance)

        coloured = (ground < COLOURED)[:, None]
        marked = ((ground == STRIPES) | (ground == DOTS))[:, None]
        # Near one mood or the other: halfway between, complementary colours would be gray.
        blend = torch.where(chance[:, 0] < 0.5, 0.4 * chance[:, 0], 0.6 + 0.4 * chance[:, 0])[:, None, None]
        sky = torch.lerp(self._skies[ground, 0], self._skies[ground, 1], blend)
        high = torch.where(coloured, top, sky[:, 0])
        low = torch.where(coloured, torch.where(marked, top, bottom), sky[:, 1])
        picture = torch.lerp(high[..., None, None], low[..., None, None], (y[:, None] + 1) / 2).repeat(1, 1, 1, side)

        def over(picture: torch.Tensor, cover: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
            return torch.lerp(picture, colour[..., None, None], cover[:, None])

        def inside(distance: torch.Tensor) -> torch.Tensor:
            """Coverage of a pixel whose centre lies `distance` within an edge."""
            return (distance / pixel + 0.5).clamp(0, 1)

        centre_x, centre_y = (0.62 - 0.2 * drift) * torch.where(phase < 0.5, -1.0, 1.0), -0.66 + 0.12 * mood
        radius = self._radius[ground][:, None, None]
        disc = inside(radius - (x - centre_x).hypot(y - centre_y))
        bitten = inside(radius - (x - centre_x - 0.45 * radius).hypot(y - centre_y + 0.2 * radius))
        disc = disc * torch.where((ground == NIGHT)[:, None, None], 1 - bitten, 1.0) * (radius > 0)
        picture = over(picture, disc, self._disc[ground])

        marks = self._pattern(ground, x, y, pixel, chance)
        for band in range(_BANDS):
            height, amplitude, waves, scalloped = _columns(self._edges[ground, band])
            angle = math.pi * waves * x + 2 * math.pi * (phase + 0.37 * band)
            wave = torch.where(scalloped > 0, 1 - 2 * (angle / 2).sin().abs(), angle.sin())
            edge = height + 0.1 * (shade - 0.5) * (amplitude > 0) + amplitude * wave
            tone = 0.94 + 0.1 * chance[:, 4:5]
            picture = over(picture, inside(y - edge), self._land[ground, band] * tone)
        mark = torch.where(marked, bottom, self._marks[ground])
        return over(picture, marks, mark)

    @staticmethod
    def _pattern(
        ground: torch.Tensor, x: torch.Tensor, y: torch.Tensor, pixel: float, chance: torch.Tensor
    ) -> torch.Tensor:
        """Coverage [B, H, H] by the marks of each picture's ground."""
        mood, phase, drift, shade, *_ = _columns(chance)

        def inside(distance: torch.Tensor) -> torch.Tensor:
            return (distance / pixel + 0.5).clamp(0, 1)

        # Stripes: upright, level or slanting.
        slant = (shade * 4).floor() * (math.pi / 4)
        period = 0.3 + 0.1 * mood
        across = x * slant.cos() + y * slant.sin() + phase
        stripes = inside(((across / period).frac().abs() - 0.5).abs() * period - period / 4)

        # Dots: on a lattice whose every other row is shifted by half.
        period = 0.34 + 0.1 * mood
        row = ((y + phase) / (0.8 * period)).floor()
        dot_x = (x + drift) / period + 0.5 * row.remainder(2)
        to_x, to_y = dot_x - dot_x.floor() - 0.5, (y + phase) / (0.8 * period) - row - 0.5
        dots = inside(0.26 * period - (to_x * period).hypot(to_y * 0.8 * period))

        # Stars and grains: one in each cell of a lattice, anywhere within it, of any size.
        grains = (ground == SAND)[:, None, None]
        cell = torch.where(grains, 0.13, 0.21)
        column, row = (x / cell).floor(), (y / cell).floor()
        dice = _hash(column * 12.9 + row * 78.2 + 50 * phase)
        other = _hash(column * 39.3 + row * 11.1 + 50 * drift)
        star_x, star_y = (column + 0.2 + 0.6 * dice) * cell, (row + 0.2 + 0.6 * other) * cell
        radius = torch.where(grains, 0.012, 0.03) * (0.4 + 0.6 * _hash(dice * 91.7)) * (other * 7).frac().ge(0.35)
        stars = inside(radius - (x - star_x).hypot(y - star_y)) * (radius > 0)
        stars = stars * torch.where(grains, (y > 0.42).float(), 1.0)

        # Clouds: three puffs on a flat foot, again and again across the sky, every other one lower.
        index = ((x + 2 * drift) / 1.15).floor()
        cloud_x = (x + 2 * drift) - (index + 0.5) * 1.15
        cloud_y = y + 0.62 - 0.24 * (index + (phase * 2).floor()).remainder(2) - 0.1 * mood
        size = 0.8 + 0.3 * shade
        puffs = torch.stack(
            [
                0.13 * size - (cloud_x + 0.17 * size).hypot(cloud_y - 0.02 * size),
                0.19 * size - cloud_x.hypot(cloud_y + 0.04 * size),
                0.12 * size - (cloud_x - 0.19 * size).hypot(cloud_y - 0.03 * size),
                torch.minimum(0.19 * size - cloud_x.abs(), 0.07 * size - (cloud_y - 0.08 * size).abs()),
            ]
        ).amax(0)
        clouds = 0.92 * inside(torch.minimum(puffs, 0.13 * size - cloud_y))

        # Planks: thin joints across a table top, closer together the farther away.
        depth = (y - 0.2).clamp(min=0.01).sqrt() * 4.2 + 0.5 * phase
        joint = (depth - depth.round()).abs() / depth.clamp(min=0.4) * 0.9
        planks = 0.5 * inside(0.006 - joint * (y - 0.2).clamp(min=0)) * (y > 0.24)

        shown = torch.zeros_like(stripes)
        for kind, coverage in ((STRIPES, stripes), (DOTS, dots), (GRASS, clouds), (NIGHT, stars), (TABLE, planks)):
            shown = torch.where((ground == kind)[:, None, None], coverage, shown)
        return torch.where(grains, 0.6 * stars, shown)
