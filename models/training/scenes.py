"""Scenes: what a picture shows, and the composing of sprites over backgrounds, a whole batch at once.

Shapes: B pictures; S styles; N concepts; C colours; P placements a scene (3); H the picture's side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from models.training.concepts import COLOURS, STYLES, WHITE, Concept, article

SINGLE, SMALL, PAIR, TWO, THREE = range(5)
KINDS = ("single", "small", "pair", "two", "three")
_SHARES = (0.55, 0.08, 0.22, 0.07, 0.08)

# (x, y) of each placement's centre and its scale, in units of half the picture; scale 0 means absent.
LAYOUTS = (
    ((0.0, 0.0, 0.72), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ((0.0, 0.0, 0.42), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ((-0.48, 0.0, 0.46), (0.48, 0.0, 0.46), (0.0, 0.0, 0.0)),
    ((-0.48, 0.0, 0.46), (0.48, 0.0, 0.46), (0.0, 0.0, 0.0)),
    ((0.0, -0.45, 0.45), (-0.46, 0.44, 0.45), (0.46, 0.44, 0.45)),
)
_LARGE_SCALE = 0.95
_JITTER = 0.03
_HELD_OUT = 0.05
_FAR_AWAY = 10.0


@dataclass
class Scenes:
    """A batch of scenes; each field is a tensor [B]."""

    kind: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    style: torch.Tensor
    top: torch.Tensor
    bottom: torch.Tensor
    styled: torch.Tensor  # the caption names the style
    named: torch.Tensor  # the caption names the background
    large: torch.Tensor

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, rows: slice) -> "Scenes":
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def gradient(self) -> torch.Tensor:
        return self.top != self.bottom


class Stage:
    """Holds the sprites and colours on the device; draws scenes at random and composes them."""

    def __init__(self, sprites: np.ndarray, concepts: Sequence[Concept], resolution: int, device: torch.device) -> None:
        """`sprites`: straight-alpha uint8 [S, N, H, H, 4] with H = `resolution` as `sprites.load_pack` gives them."""
        self.concepts = tuple(concepts)
        self.resolution = resolution
        self.device = device
        flat = torch.from_numpy(sprites.reshape(-1, *sprites.shape[2:])).to(device).permute(0, 3, 1, 2)
        pieces = []
        for part in flat.split(64):  # premultiplied in parts, to keep the float32 copy small
            colour = part.float() / 255
            colour[:, :3] *= colour[:, 3:]
            pieces.append(colour.half())
        self._full = torch.cat(pieces)
        self._half = torch.cat([F.avg_pool2d(part.float(), 2).half() for part in self._full.split(64)])
        self.colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 255
        self._layouts = torch.tensor(LAYOUTS, device=device)

    @cached_property
    def held_out(self) -> torch.Tensor:
        """Bool [N, S, C]: the (concept, style, colour) triples that training never shows. White is never held out."""
        table = np.random.default_rng(20_240_601).random((len(self.concepts), len(STYLES), len(COLOURS))) < _HELD_OUT
        table[:, :, WHITE] = False
        return torch.from_numpy(table).to(self.device)

    def _integers(self, count: int, high: int) -> torch.Tensor:
        return torch.randint(0, high, (count,), device=self.device)

    def _chance(self, count: int, probability: float) -> torch.Tensor:
        return torch.rand(count, device=self.device) < probability

    def _kinds(self, count: int) -> torch.Tensor:
        """Kinds in fixed shares, in order, so that no random count needs a device round trip."""
        ends = torch.tensor(_SHARES, dtype=torch.float64).cumsum(0).mul(count).round().long().tolist()
        kinds = torch.full((count,), THREE, device=self.device)
        for kind, start in zip(range(4, -1, -1), [*ends[3::-1], 0], strict=True):
            kinds[start : ends[kind]] = kind
        return kinds

    def sample(self, count: int) -> Scenes:
        """Random training scenes, none of which shows a held-out triple."""
        kind, first = self._kinds(count), self._integers(count, len(self.concepts))
        second = torch.where(kind == PAIR, self._integers(count, len(self.concepts)), first)
        styled = self._chance(count, 0.75)
        style = torch.where(styled, self._integers(count, len(STYLES)), 0)
        named = ~self._chance(count, 0.08)
        gradient = named & self._chance(count, 0.35)
        top, bottom = self._allowed_colours(first, second, style, gradient)
        return Scenes(
            kind=kind,
            first=first,
            second=second,
            style=style,
            top=torch.where(named, top, WHITE),
            bottom=torch.where(named, bottom, WHITE),
            styled=styled,
            named=named,
            large=(kind == SINGLE) & self._chance(count, 0.22),
        )

    def _allowed_colours(
        self, first: torch.Tensor, second: torch.Tensor, style: torch.Tensor, gradient: torch.Tensor, tries: int = 8
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(top, bottom) colours: the first of a few draws that shows no held-out triple; white if none is allowed."""
        count, total = len(first), len(COLOURS)
        top = torch.randint(0, total, (count, tries), device=self.device)
        other = (top + torch.randint(1, total, (count, tries), device=self.device)) % total
        bottom = torch.where(gradient[:, None], other, top)
        held = torch.zeros(count, tries, dtype=torch.bool, device=self.device)
        for concept in (first, second):
            row = self.held_out[concept, style]
            held |= row.gather(1, top) | row.gather(1, bottom)
        best = (~held).int().argmax(1, keepdim=True)
        none = held.all(1)
        top, bottom = top.gather(1, best)[:, 0], bottom.gather(1, best)[:, 0]
        return torch.where(none, WHITE, top), torch.where(none, WHITE, bottom)

    def compose(self, scenes: Scenes, jitter: float = _JITTER) -> torch.Tensor:
        """Pictures [B, 3, H, H] in [-1, 1]: sprites over a vertical gradient, premultiplied alpha."""
        picture = self.background(scenes.top, scenes.bottom)
        place = self._layouts[scenes.kind]  # [B, P, 3]
        noise = (torch.rand(place.shape, device=self.device) * 2 - 1) * jitter
        scale = torch.where(scenes.large[:, None], _LARGE_SCALE, place[..., 2])
        present = place[..., 2] > 0
        single = scenes.kind == SINGLE
        centre = place[..., :2] + noise[..., :2]
        for index in range(3):
            x, y = centre[:, index, 0], centre[:, index, 1]
            size = (scale[:, index] * (1 + 0.5 * noise[:, index, 2])).clamp(min=0.05)
            x = torch.where(present[:, index], x, _FAR_AWAY)
            concept = scenes.second if index == 1 else scenes.first
            row = scenes.style * len(self.concepts) + concept
            if index == 0:
                picture = self._paste(picture, self._full, row, torch.where(single, x, _FAR_AWAY), y, size)
            picture = self._paste(picture, self._half, row, torch.where(single, _FAR_AWAY, x), y, size)
        return picture * 2 - 1

    def background(self, top: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
        """Vertical gradients [B, 3, H, H] in [0, 1] between two colours."""
        ramp = torch.linspace(0, 1, self.resolution, device=self.device)[None, None, :, None]
        start, end = self.colours[top][:, :, None, None], self.colours[bottom][:, :, None, None]
        return torch.lerp(start, end, ramp).expand(-1, -1, -1, self.resolution)

    def close_ups(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For the judge: one object filling a picture of half the side, [B, 3, H/2, H/2], and its concept [B]."""
        concept, style = self._integers(count, len(self.concepts)), self._integers(count, len(STYLES))
        top = self._integers(count, len(COLOURS))
        bottom = torch.where(self._chance(count, 0.35), self._integers(count, len(COLOURS)), top)
        x, y, size = (torch.rand(3, count, device=self.device) * 2 - 1) * torch.tensor(
            [[0.12], [0.12], [0.22]], device=self.device
        )
        picture = F.avg_pool2d(self.background(top, bottom), 2)
        row = style * len(self.concepts) + concept
        return self._paste(picture, self._half, row, x, y, size + 0.78) * 2 - 1, concept

    @staticmethod
    def _paste(
        picture: torch.Tensor,
        table: torch.Tensor,
        row: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        """`table[row]` over `picture`, centred at (x, y) with half-side `scale`."""
        affine = torch.zeros(len(row), 2, 3, device=picture.device)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 / scale
        affine[:, 0, 2], affine[:, 1, 2] = -x / scale, -y / scale
        grid = F.affine_grid(affine, [len(row), 4, *picture.shape[2:]], align_corners=False)
        sprite = F.grid_sample(table[row].float(), grid, padding_mode="zeros", align_corners=False)
        return picture * (1 - sprite[:, 3:]) + sprite[:, :3]


def describe(scenes: Scenes, concepts: Sequence[Concept], names: Sequence[str] | None = None) -> list[str]:
    """Plain English for each scene, the wording that evaluation uses; `names` replaces the first concept's name."""
    styles, colours = STYLES, tuple(COLOURS)
    prompts = []
    columns = zip(*(getattr(scenes, field.name).tolist() for field in fields(scenes)), strict=True)
    for row, (kind, first, second, style, top, bottom, styled, named, large) in enumerate(columns):
        size = "large" if large else "small" if kind == SMALL else ""
        noun = names[row] if names else concepts[first].name
        words = [size, styles[style] if styled else "", noun if kind < TWO else concepts[first].plural]
        subject = " ".join(word for word in words if word)
        if kind == TWO:
            subject = "two " + subject
        elif kind == THREE:
            subject = "three " + subject
        elif concepts[first].plural != concepts[first].name:
            subject = f"{article(subject)} {subject}"
        if kind == PAIR:
            subject += f" to the left of {article(concepts[second].name)} {concepts[second].name}"
        if named and top == bottom:
            subject += f" on {article(colours[top])} {colours[top]} background"
        elif named:
            subject += f" on {article(colours[top])} {colours[top]} to {colours[bottom]} gradient"
        prompts.append(subject)
    return prompts
