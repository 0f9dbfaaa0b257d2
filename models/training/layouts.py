"""Layouts: where the objects of a scene stand, for one group or two in a relation.

Shapes: B scenes; P placements a scene (5). Places are (x, y, scale) with centre and half-side in units of half the
picture, y downwards, scale 0 for an absent object. The first group's objects come first.
"""

import torch

PLACEMENTS = 5
RELATIONS = ("and", "left of", "right of", "above", "below", "behind", "in front of", "on")
AND, LEFT, RIGHT, ABOVE, BELOW, BEHIND, IN_FRONT, ON = range(len(RELATIONS))
SMALL, LARGE = 1, 2

_FACTORS = (1.0, 0.6, 1.4)  # of the usual scale: unsaid, SMALL, LARGE
_BESIDE_LARGE = (0.65, 0.6, 1.0)  # the same where one of two is LARGE, so that both still fit
_LIFT = 1.1  # of one object above another, for a clear gap: it does not stand on it
_ALONE = 0.64
# Side of a latent of a picture of 256 pixels, in units of half the picture. Squares begin and end on this grid: the
# same drawing then has the same latents wherever it stands, and there is less to learn (see `_on_grid`).
_CELL = 1 / 16
_SIDES = (9, 13, 20, 28)  # cells of an object's square, for the same reason: every size of a drawing is learned alone

Place = tuple[float, float, float]


def _at(scale: float, *centres: tuple[float, float]) -> tuple[Place, ...]:
    return tuple((x, y, scale) for x, y in centres)


# One group of 1 to 5 objects: arrangements to choose from.
_GROUPS: dict[int, tuple[tuple[Place, ...], ...]] = {
    1: (_at(_ALONE, (0, 0)),),
    2: (
        _at(0.44, (-0.49, 0), (0.49, 0)),
        _at(0.44, (-0.44, -0.44), (0.44, 0.44)),
        _at(0.44, (0.44, -0.44), (-0.44, 0.44)),
        _at(0.44, (0, -0.48), (0, 0.48)),
    ),
    3: (
        _at(0.3, (-0.65, 0), (0, 0), (0.65, 0)),
        _at(0.42, (0, -0.47), (-0.47, 0.44), (0.47, 0.44)),
        _at(0.42, (-0.47, -0.44), (0.47, -0.44), (0, 0.47)),
        _at(0.32, (-0.62, -0.6), (0, 0), (0.62, 0.6)),
    ),
    4: (
        _at(0.4, (-0.46, -0.46), (0.46, -0.46), (-0.46, 0.46), (0.46, 0.46)),
        _at(0.3, (0, -0.62), (-0.6, 0), (0.6, 0), (0, 0.62)),
        _at(0.31, (-0.65, -0.34), (0, -0.34), (0.65, -0.34), (0, 0.4)),
        _at(0.31, (0, -0.4), (-0.65, 0.34), (0, 0.34), (0.65, 0.34)),
    ),
    5: (
        _at(0.31, (-0.6, -0.6), (0.6, -0.6), (0, 0), (-0.6, 0.6), (0.6, 0.6)),
        _at(0.29, (-0.35, -0.37), (0.35, -0.37), (-0.66, 0.37), (0, 0.37), (0.66, 0.37)),
        _at(0.29, (-0.66, -0.37), (0, -0.37), (0.66, -0.37), (-0.35, 0.37), (0.35, 0.37)),
    ),
}

# Two groups, the first on the left; the other directions are turned copies. (1, 2) is (2, 1) mirrored, and so on.
_PAIRS: dict[tuple[int, int], tuple[tuple[Place, ...], ...]] = {
    (1, 1): (_at(0.46, (-0.49, 0), (0.49, 0)),),
    (2, 1): (
        _at(0.42, (-0.5, -0.46), (-0.5, 0.46), (0.5, 0)),
        _at(0.29, (-0.69, 0), (-0.08, 0), (0.68, 0)),
    ),
    (3, 1): (_at(0.28, (-0.69, 0.34), (-0.06, 0.34), (-0.38, -0.32), (0.64, 0)),),
    (4, 1): (_at(0.28, (-0.69, -0.34), (-0.06, -0.34), (-0.69, 0.34), (-0.06, 0.34), (0.66, 0)),),
    (2, 2): (_at(0.4, (-0.5, -0.45), (-0.5, 0.45), (0.5, -0.45), (0.5, 0.45)),),
    (3, 2): (_at(0.28, (-0.69, 0.34), (-0.06, 0.34), (-0.38, -0.32), (0.65, -0.36), (0.65, 0.36)),),
}
_VARIANTS = 4


def _mirrored(first: int, arrangement: tuple[Place, ...]) -> tuple[Place, ...]:
    """Left and right exchanged, the right group's objects listed first."""
    turned = tuple((-x, y, scale) for x, y, scale in arrangement)
    return turned[first:] + turned[:first]


def _table() -> list[list[list[tuple[Place, ...]]]]:
    """Arrangements by (first count, second count, variant), each padded to PLACEMENTS and _VARIANTS by repeating."""
    options = {(count, 0): group for count, group in _GROUPS.items()} | _PAIRS
    for (first, second), arrangements in _PAIRS.items():
        if first != second:
            options[second, first] = tuple(_mirrored(first, arrangement) for arrangement in arrangements)
    nothing: tuple[Place, ...] = ((0.0, 0.0, 0.0),) * PLACEMENTS
    table = []
    for first in range(PLACEMENTS + 1):
        row = []
        for second in range(PLACEMENTS + 1):
            found = options.get((first, second), (nothing,))
            padded = [(arrangement + nothing)[:PLACEMENTS] for arrangement in found]
            row.append([padded[variant % len(padded)] for variant in range(_VARIANTS)])
        table.append(row)
    return table


def _on_grid(places: torch.Tensor) -> torch.Tensor:
    """Places [B, P, 3] near these whose squares begin on the grid, inside the picture."""
    scale = places[..., 2:]
    corner = ((places[..., :2] - scale) / _CELL).round() * _CELL
    return torch.cat([torch.minimum(corner.clamp(min=-1), 1 - 2 * scale) + scale, scale], -1)


def _stand(places: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
    """Places on the grid; where `on` [B], the first object's is that which sinks least into the second's."""
    snapped = _on_grid(places)
    feet = places[:, 0, 1] + snapped[:, 1, 1] - places[:, 1, 1]
    scale = snapped[:, 0, 2]
    lower = torch.ceil((feet - scale) / _CELL - 1e-3).clamp(min=-1 / _CELL) * _CELL + scale
    snapped[:, 0, 1] = torch.where(on, lower, snapped[:, 0, 1])
    return snapped


class Layouts:
    """The table of arrangements on a device."""

    def __init__(self, device: torch.device) -> None:
        self._table = torch.tensor(_table(), device=device)
        self._factors = torch.tensor([_FACTORS, _BESIDE_LARGE], device=device)
        self._scales = torch.tensor(_SIDES, device=device) * (_CELL / 2)
        self._between = (self._scales[1:] * self._scales[:-1]).sqrt()

    def _nearest(self, scale: torch.Tensor) -> torch.Tensor:
        """The scales of _SIDES nearest to these by their ratios; 0 stays."""
        return torch.where(scale > 0, self._scales[torch.bucketize(scale, self._between)], 0.0)

    def places(
        self,
        count: torch.Tensor,
        size: torch.Tensor,
        relation: torch.Tensor,
        turn: torch.Tensor,
        extent: torch.Tensor,
        standing: torch.Tensor,
    ) -> torch.Tensor:
        """Random places [B, P, 3] for scenes of this meaning, each object's square inside the picture.

        `count`, `size` [B, 2] and `relation` [B] as in `Scenes`; `turn` [B, P] radians; `extent` [B, P, 3]: the top of
        the drawing, its top near the middle, and its bottom, as shares of the scale; `standing` [B]: objects rest with
        their feet in the lower part of the picture. BEHIND, IN_FRONT and ON are for one object and one other.
        """
        total, device = len(count), count.device

        def spread(*shape: int) -> torch.Tensor:
            return torch.rand(total, *shape, device=device) * 2 - 1

        variant = torch.randint(0, _VARIANTS, (total,), device=device)
        x, y, scale = self._table[count[:, 0], count[:, 1], variant].unbind(-1)
        turned = (relation == ABOVE) | (relation == BELOW)
        reversed_ = (relation == RIGHT) | (relation == BELOW)
        sign = torch.where(reversed_, -1.0, 1.0)[:, None]
        x, y = torch.where(turned[:, None], y, x * sign), torch.where(turned[:, None], x * sign, y)
        stacked = (turned & (count.sum(1) == 2))[:, None]
        y = torch.where(stacked, y * _LIFT, y)

        alone = (count.sum(1) == 1)[:, None]
        several = (count.sum(1) > 2)[:, None]
        slots = torch.arange(PLACEMENTS, device=device)
        group = (slots >= count[:, :1]).long()
        beside = (size == LARGE).any(1, keepdim=True) & (count[:, 1:] > 0)
        factor = self._factors[beside.long(), size].gather(1, group)
        factor = torch.where(several | (~alone & (count[:, 1:] == 0)), factor.clamp(max=1), factor)
        scale = self._nearest(scale * factor)
        x = x + spread(PLACEMENTS) * torch.where(alone, 0.1, 0.025)
        y = y + spread(PLACEMENTS) * torch.where(alone, 0.08, 0.025)

        x, y, scale = self._overlapping(x, y, scale, relation, factor, extent, spread(4))
        upright = standing[:, None] & (relation != ON)[:, None]
        top, _, bottom = extent.unbind(-1)
        y = torch.where(upright, y + scale * (1 - bottom), y)
        lowest = torch.where(scale > 0, y + scale * bottom, -2).amax(1, keepdim=True)
        highest = torch.where(scale > 0, y + scale * top, 2).amin(1, keepdim=True)
        drop = (0.8 + 0.06 * spread(1) - lowest).clamp(max=2)
        y = torch.where(standing[:, None], y + torch.maximum(drop, -0.98 - highest), y)

        reach = turn.cos().abs() + turn.sin().abs()
        scale = torch.minimum(scale, 1 / reach)
        room = 1 - scale * reach
        places = torch.stack([torch.minimum(torch.maximum(x, -room), room), y.clamp(min=-room, max=room), scale], -1)
        # What is turned has latents of its own anyway.
        free = (turn != 0) | (scale <= 0)
        return torch.where(free[..., None], places, _stand(places, relation == ON))

    def _overlapping(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        scale: torch.Tensor,
        relation: torch.Tensor,
        factor: torch.Tensor,
        extent: torch.Tensor,
        spread: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first two places moved together for BEHIND, IN_FRONT and ON."""
        on, front = relation == ON, relation == IN_FRONT
        deep = front | (relation == BEHIND)

        # In depth: the farther object higher, to one side, about a third of its square covered.
        nearer = torch.stack([front, ~front], 1)
        deep_scale = self._nearest(0.44 * factor[:, :2])
        reach = deep_scale.sum(1, keepdim=True)
        side = torch.where(spread[:, :1] < 0, -1.0, 1.0) * (0.21 + 0.03 * spread[:, 1:2]) * reach
        deep_x = torch.cat([-side, side], 1)
        deep_y = torch.where(nearer, 1.0, -1.0) * (0.14 + 0.02 * spread[:, 2:3]) * reach

        # One on the other: the first's feet sink a little into the second's top, and the two are centred as one.
        upper, lower = self._nearest(0.42 * factor[:, :2]).unbind(1)
        contact = 0.05 * upper
        lower_y = torch.zeros_like(lower)
        upper_y = lower_y + lower * extent[:, 1, 1] - upper * extent[:, 0, 2] + contact
        middle = (upper_y + upper * extent[:, 0, 0] + lower * extent[:, 1, 2]) / 2
        on_x = torch.stack([0.12 * lower * spread[:, 1], torch.zeros_like(lower)], 1) + 0.1 * spread[:, 3:]
        on_y = torch.stack([upper_y - middle, lower_y - middle], 1)
        on_scale = torch.stack([upper, lower], 1)

        def chosen(usual: torch.Tensor, in_depth: torch.Tensor, stacked: torch.Tensor) -> torch.Tensor:
            two = torch.where(on[:, None], stacked, torch.where(deep[:, None], in_depth, usual[:, :2]))
            return torch.cat([two, usual[:, 2:]], 1)

        return chosen(x, deep_x, on_x), chosen(y, deep_y, on_y), chosen(scale, deep_scale, on_scale)
