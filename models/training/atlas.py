"""Atlas: every sprite at several sizes on the device, drawn anywhere in a picture, minified without aliasing.

Shapes: R sprites; B pictures; H the picture's side. An atlas row holds the sprite and its halvings (a mip map,
Williams, Pyramidal Parametrics, 1983) side by side, premultiplied, each within a border of one clear texel.
"""

import math

import torch
import torch.nn.functional as F

from models.training.tints import brightness

_LEVELS = 4
_SHARPNESS = 0.3  # the share of a halving from which on the next smaller level is taken
_OPAQUE = 0.5
_MIDDLE = 0.3  # the share of the width, about the centre, that something may be stood upon
_PART = 64


class Atlas:
    """Sprites as uint8 [R, 4, side + 2, ...], with what scenes must know of each drawing.

    `knee` [R] is the typical brightness (see `tints.recolour`). `extent` [R, 3] holds the topmost visible pixel, the
    topmost near the middle and the lowest one, as shares of the half-side, downwards.
    """

    def __init__(self, pixels: torch.Tensor, device: torch.device) -> None:
        """`pixels`: uint8 [R, side, side, 4], straight alpha; side a multiple of 8."""
        rows, side = pixels.shape[:2]
        sides = [side >> level for level in range(_LEVELS)]
        below = [0, 0, *(sum(part + 2 for part in sides[1:level]) for level in range(2, _LEVELS))]
        across = [0, *([side + 2] * (_LEVELS - 1))]
        width, height = side + 2 + sides[1] + 2, max(side + 2, below[-1] + sides[-1] + 2)
        self._texels = torch.zeros(rows, 4, height, width, dtype=torch.uint8, device=device)
        self._span = torch.tensor([width - 1.0, height - 1.0], device=device)
        self._sides = torch.tensor(sides, dtype=torch.float32, device=device)
        self._corners = torch.tensor([across, below], dtype=torch.float32, device=device).T
        self.knee = torch.empty(rows, device=device)
        self.extent = torch.empty(rows, 3, device=device)
        for start in range(0, rows, _PART):  # in parts, to keep the float32 copy small
            part = slice(start, start + _PART)
            colour = pixels[part].to(device).permute(0, 3, 1, 2).float() / 255
            alpha = colour[:, 3:]
            self.extent[part] = _extent(alpha[:, 0] >= _OPAQUE)
            level = torch.cat([colour[:, :3] * alpha, alpha], 1)
            for x, y, length in zip(across, below, sides, strict=True):
                window = self._texels[part, :, y + 1 : y + 1 + length, x + 1 : x + 1 + length]
                window.copy_((level * 255).round())
                level = F.avg_pool2d(level, 2)
            self.knee[part] = _knee(level)

    def draw(
        self, row: torch.Tensor, place: torch.Tensor, turn: torch.Tensor, mirror: torch.Tensor, side: int
    ) -> torch.Tensor:
        """Premultiplied pictures [B, 4, `side`, `side`] of sprites `row` [B]: clear but for one sprite each.

        `place` [B, 3]: centre and half-side in half-picture units, clear throughout at scale 0; `turn` [B] radians,
        clockwise; `mirror` [B] exchanges left and right.
        """
        x, y, scale = place.unbind(1)
        absent = scale <= 0
        scale = torch.where(absent, 1.0, scale)
        wanted = (self._sides[0] / (scale * side)).log2() + _SHARPNESS
        level = wanted.floor().clamp(0, _LEVELS - 1).long()
        length, corner = self._sides[level], self._corners[level]
        cosine, sine = turn.cos() / scale, turn.sin() / scale
        flip = torch.where(mirror, -1.0, 1.0)
        # Picture (px, py) to sprite (u, v), both in [-1, 1].
        linear = torch.stack([torch.stack([cosine * flip, sine * flip], 1), torch.stack([-sine, cosine], 1)], 1)
        offset = -(linear @ torch.stack([x, y], 1)[..., None])[..., 0]
        offset = torch.where(absent[:, None], math.inf, offset)
        # Sprite (u, v) to texels of its level, to the atlas' own [-1, 1]; clamping ends in the clear border.
        unit = length[:, None] / self._span
        middle = 2 * (corner + (length[:, None] + 1) / 2) / self._span - 1
        low, high = 2 * corner / self._span - 1, 2 * (corner + length[:, None] + 1) / self._span - 1
        theta = torch.cat([linear * unit[..., None], (offset * unit + middle)[..., None]], 2)
        grid = F.affine_grid(theta.nan_to_num(posinf=4.0), [len(row), 4, side, side], align_corners=False)
        grid = torch.minimum(torch.maximum(grid, low[:, None, None]), high[:, None, None])
        return F.grid_sample(self._texels[row].float(), grid, align_corners=True) / 255


def _knee(sprite: torch.Tensor) -> torch.Tensor:
    """The median brightness of premultiplied sprites [R, 4, side, side], clear parts left out, [R]."""
    alpha = sprite[:, 3].flatten(1)
    value, order = (brightness(sprite[:, :3])[:, 0].flatten(1) / alpha.clamp(min=1e-3)).sort(1)
    below = alpha.gather(1, order).cumsum(1)
    middle = (below < below[:, -1:] / 2).sum(1, keepdim=True).clamp(max=value.shape[1] - 1)
    return value.gather(1, middle)[:, 0].clamp(0.15, 0.98)


def _extent(opaque: torch.Tensor) -> torch.Tensor:
    """[R, 3] of `opaque` [R, side, side]; a sprite with nothing near its middle stands in with its whole top."""
    side = opaque.shape[-1]
    start = round(side * (1 - _MIDDLE) / 2)
    whole, middle = opaque.any(2).float(), opaque[:, :, start : side - start].any(2).float()
    top, bottom = whole.argmax(1), side - whole.flip(1).argmax(1)
    inner = torch.where(middle.any(1), middle.argmax(1), top)
    return torch.stack([top, inner, bottom], 1) * (2 / side) - 1
