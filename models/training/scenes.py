"""Scenes: what a picture shows, drawn at random, and the composing of sprites over grounds, a whole batch at once.

Shapes: B pictures; S styles; N concepts; C colours; T tints, natural among them; P placements a scene (5); H the
picture's side. Nothing here waits for the device between a call and its return.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

from models.training.atlas import Atlas
from models.training.concepts import COLOURS, TINTS, WHITE, Concept
from models.training.grounds import COLOURED, DOTS, GRADIENT, GRASS, GROUNDS, PLAIN, SAND, STRIPES, TABLE, Grounds
from models.training.layouts import AND, BEHIND, IN_FRONT, LARGE, ON, PLACEMENTS, RELATIONS, SMALL, Layouts
from models.training.sprites import SpritePack
from models.training.tints import ramps, recolour

KINDS = ("single", "recoloured", "sized", "counts", "pair", "mixed")
SINGLE, RECOLOURED, SIZED, COUNTS, PAIR, MIXED = range(len(KINDS))
_KIND_SHARES = (0.3, 0.1, 0.1, 0.15, 0.25, 0.1)
_RELATION_SHARES = (0.23, 0.11, 0.11, 0.11, 0.11, 0.11, 0.11, 0.11)
_GROUND_SHARES = (0.32, 0.14, 0.08, 0.08, 0.08, 0.08, 0.08, 0.07, 0.07)
# (first, second) counts of MIXED, all equally likely.
_MIXTURES = ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (3, 2), (2, 3), (4, 1), (1, 4))

_TINTED = 0.12  # of tintable subjects, besides those of RECOLOURED
_SAID_SIZE = 0.12  # of the subjects of a pair
_STYLED = 0.78
_NAMED = 0.93
_STILL, _TURN = 0.75, 0.16  # share of the objects that are not turned; radians, at most, of the others
_CONTRAST = 0.3  # between the two colours of a ground, at least, as a distance in the unit cube

_HELD_OUT_COLOURS, _HELD_OUT_TINTS, _HELD_OUT_PAIRS = 0.05, 0.1, 0.05
_SEED = 20_240_601
_CHUNK = 128 * 256 * 256  # pixels composed at once


@dataclass
class Scenes:
    """A batch of scenes; every field is a tensor with B first.

    A scene shows one group of objects or two in a relation. Objects are pasted in the order of their placements, later
    ones in front.
    """

    concept: torch.Tensor  # long [B, 2]
    count: torch.Tensor  # long [B, 2]: 1 to 5 of the first, 0 to 4 of the second (0: no second group), at most 5 in all
    tint: torch.Tensor  # long [B, 2]: 0 natural, else 1 + index in TINTS
    size: torch.Tensor  # long [B, 2]: 0 unsaid, SMALL, LARGE
    relation: torch.Tensor  # long [B]: of the first group to the second, index in RELATIONS
    style: torch.Tensor  # long [B]
    ground: torch.Tensor  # long [B]: index in GROUNDS
    top: torch.Tensor  # long [B]: the ground's colour, or its upper or base one; white where it bears none
    bottom: torch.Tensor  # long [B]: its lower one or its marks'
    styled: torch.Tensor  # bool [B]: the caption names the style
    named: torch.Tensor  # bool [B]: the caption names the ground
    drawing: torch.Tensor  # long [B, P]: row of the pack
    place: torch.Tensor  # float [B, P, 3]: x, y, half-side in half-picture units, y downwards; half-side 0: absent
    turn: torch.Tensor  # float [B, P]: radians, clockwise
    mirror: torch.Tensor  # bool [B, P]
    group: torch.Tensor  # long [B, P]: which group the placement belongs to

    def __len__(self) -> int:
        return len(self.relation)

    def __getitem__(self, rows: slice | torch.Tensor) -> "Scenes":
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def cat(parts: Sequence["Scenes"]) -> "Scenes":
        """All scenes of `parts` in order."""
        return Scenes(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scenes)))


def _hold_out(eligible: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A bool table like `eligible`: this share of its true entries (at least one, if there are any), seeded."""
    entries = np.flatnonzero(eligible)
    chosen = np.random.default_rng(seed).permutation(entries)[: max(1, round(share * len(entries)))]
    table = np.zeros(eligible.shape, bool)
    table.flat[chosen] = True
    return table


class Stage:
    """Holds the sprites and colours on the device; draws scenes at random and composes them.

    `drawn` bool [N, S]: the style has a drawing of the concept. Held out of training: `held_out_colours` [N, S, C],
    concepts in a style on a ground of a colour (never white); `held_out_tints` [N, T], concepts in a tint (never
    natural); `held_out_pairs` [N, N], two concepts in one picture, in either order.
    """

    def __init__(self, pack: SpritePack, concepts: Sequence[Concept], device: torch.device) -> None:
        self.concepts = tuple(concepts)
        self.device = device
        self.colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 255
        self._atlas = Atlas(pack.pixels, device)
        self._grounds = Grounds(device)
        self._layouts = Layouts(device)
        self._rows, self._counts = pack.rows.to(device), pack.counts.to(device)
        self._ramps = ramps(device)
        self._flips = torch.tensor([concept.flips for concept in concepts], device=device)
        self._kind_ends, self._relation_ends = self._ends(_KIND_SHARES), self._ends(_RELATION_SHARES)
        self._ground_ends, self._coloured_ends = self._ends(_GROUND_SHARES), self._ends(_GROUND_SHARES[:COLOURED])
        self._mixtures = torch.tensor(_MIXTURES, device=device)
        self._contrast = torch.cdist(self.colours, self.colours) >= _CONTRAST

        drawn = pack.counts.cpu().numpy() > 0
        tintable = np.array([concept.tintable for concept in concepts])
        coloured = np.repeat(drawn[:, :, None], len(COLOURS), 2)
        coloured[:, :, WHITE] = False
        tinted = np.repeat(tintable[:, None], len(TINTS) + 1, 1)
        tinted[:, 0] = False
        together = np.triu(drawn.astype(int) @ drawn.T.astype(int) > 0, 1)
        pairs = _hold_out(together, _HELD_OUT_PAIRS, _SEED + 2)

        def table(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device)

        self.drawn, self._tintable = table(drawn), table(tintable)
        self.held_out_colours = table(_hold_out(coloured, _HELD_OUT_COLOURS, _SEED))
        self.held_out_tints = table(_hold_out(tinted, _HELD_OUT_TINTS, _SEED + 1))
        self.held_out_pairs = table(pairs | pairs.T)
        self._partners = ~self.held_out_pairs & ~torch.eye(len(concepts), dtype=torch.bool, device=device)
        self._triples = self.held_out_colours.nonzero()
        self._recolourings = self.held_out_tints.nonzero()
        self._couples = self.held_out_pairs.nonzero()

    def _chance(self, probability: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, device=self.device) < probability

    def _ends(self, shares: Sequence[float]) -> torch.Tensor:
        """Where each share of the whole ends, the last left out, as `_draw` takes them."""
        return torch.tensor(shares, device=self.device).cumsum(0)[:-1] / sum(shares)

    def _draw(self, ends: torch.Tensor, count: int) -> torch.Tensor:
        """Indices [`count`] with the shares behind `ends`."""
        return torch.bucketize(torch.rand(count, device=self.device), ends)

    def _pick(self, mask: torch.Tensor) -> torch.Tensor:
        """For each row of `mask` [B, K] one of its true columns, all equally likely; any column if none is true."""
        return torch.where(mask, torch.rand(mask.shape, device=self.device), -1.0).argmax(1)

    def _entry(self, table: torch.Tensor, count: int) -> torch.Tensor:
        """`count` rows of `table`, drawn at random."""
        return table[torch.randint(0, len(table), (count,), device=self.device)]

    def sample(self, count: int) -> Scenes:
        """Random training scenes, none of which shows anything held out."""
        kind = self._draw(self._kind_ends, count)
        anyone = self.drawn.any(1)
        first = self._pick(torch.where((kind == RECOLOURED)[:, None], self._tintable & anyone, anyone))
        styled = self._chance(_STYLED, count) | ~self.drawn[first, 0]
        style = torch.where(styled, self._pick(self.drawn[first]), 0)
        partners = self._partners[first] & self.drawn.T[style]
        two = ((kind == PAIR) | (kind == MIXED)) & partners.any(1)
        concept = torch.stack([first, torch.where(two, self._pick(partners), first)], 1)

        numbers = self._numbers(torch.where(two | (kind < PAIR), kind, SINGLE), count)
        always = torch.stack([kind == RECOLOURED, torch.zeros_like(two)], 1)
        tint = torch.randint(1, len(TINTS) + 1, (count, 2), device=self.device)
        tint = torch.where((self._chance(_TINTED, count, 2) | always) & self._tintable[concept], tint, 0)
        tint = torch.where(self.held_out_tints[concept, tint] | (numbers[0] == 0), 0, tint)

        allowed = ~(self.held_out_colours[concept, style[:, None]].any(1))
        named = self._chance(_NAMED, count)
        ground, top, bottom = self._ground(allowed, named, self._pick(allowed))
        return self.arrange(concept, numbers[0], tint, *numbers[1:], style, ground, top, bottom, styled, named)

    def sample_held_out(self, count: int, kind: str) -> Scenes:
        """Random scenes of one of KINDS, each of which shows something held out of training.

        For "single", "sized" and "counts" that is a concept in a style on a colour, for "recoloured" a concept in a
        tint, for "pair" and "mixed" two concepts together. Raises ValueError where nothing of the kind is held out.
        """
        index = KINDS.index(kind)
        source = {RECOLOURED: self._recolourings, PAIR: self._couples, MIXED: self._couples}.get(index, self._triples)
        if not len(source):
            raise ValueError(f"these concepts have nothing held out of the kind {kind}")
        entry = self._entry(source, count)
        concept, tint = entry[:, :1].repeat(1, 2), torch.zeros(count, 2, dtype=torch.long, device=self.device)
        named = torch.ones(count, dtype=torch.bool, device=self.device)
        anything = torch.ones(count, len(COLOURS), dtype=torch.bool, device=self.device)
        if source is self._triples:
            style = entry[:, 1]
            ground, top, bottom = self._ground(anything, named, entry[:, 2], coloured=True)
        else:
            if source is self._couples:
                concept = entry
            else:
                tint[:, 0] = entry[:, 1]
            style = self._pick(self.drawn[concept].all(1))
            ground, top, bottom = self._ground(anything, named, self._pick(anything))
        styled = (style > 0) | self._chance(_STYLED, count)
        numbers, size, relation = self._numbers(torch.full((count,), index, device=self.device), count)
        return self.arrange(concept, numbers, tint, size, relation, style, ground, top, bottom, styled, named)

    def _numbers(self, kind: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Counts [B, 2], sizes [B, 2] and relations [B] for scenes of these kinds."""
        pair, mixed = kind == PAIR, kind == MIXED
        several = torch.where(kind == COUNTS, torch.randint(2, PLACEMENTS + 1, (count,), device=self.device), 1)
        numbers = torch.stack([several, pair.long()], 1)
        numbers = torch.where(mixed[:, None], self._entry(self._mixtures, count), numbers)

        said = torch.stack([(kind == SIZED) | (pair & self._chance(_SAID_SIZE, count)), pair], 1)
        said[:, 1] &= self._chance(_SAID_SIZE, count)
        size = torch.where(said, torch.randint(SMALL, LARGE + 1, (count, 2), device=self.device), 0)
        size[:, 1] = torch.where(size[:, 1] == size[:, 0], 0, size[:, 1])

        relation = self._draw(self._relation_ends, count)
        relation = torch.where(mixed & ((relation >= BEHIND) | self._chance(0.4, count)), AND, relation)
        return numbers, size, torch.where(pair | mixed, relation, AND)

    def _ground(
        self, allowed: torch.Tensor, named: torch.Tensor, top: torch.Tensor, coloured: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ground, top and bottom, [B] each: `top` [B] where the ground bears colours, with another `allowed` [B, C]."""
        ground = self._draw(self._coloured_ends if coloured else self._ground_ends, len(top))
        others = allowed & self._contrast[top]
        two = (ground == GRADIENT) | (ground == STRIPES) | (ground == DOTS)
        ground = torch.where(named & ~(two & ~others.any(1)), ground, PLAIN)
        bottom = torch.where(ground == PLAIN, top, self._pick(others))
        white = ~named | (ground >= COLOURED)
        return ground, torch.where(white, WHITE, top), torch.where(white, WHITE, bottom)

    def arrange(
        self,
        concept: torch.Tensor,
        count: torch.Tensor,
        tint: torch.Tensor,
        size: torch.Tensor,
        relation: torch.Tensor,
        style: torch.Tensor,
        ground: torch.Tensor,
        top: torch.Tensor,
        bottom: torch.Tensor,
        styled: torch.Tensor,
        named: torch.Tensor,
    ) -> Scenes:
        """Scenes of this meaning (fields as in `Scenes`), with drawings, places, turns and mirroring drawn at random.

        Every concept must be drawn in its style; BEHIND, IN_FRONT and ON hold between one object and one other.
        """
        total = len(relation)
        slots = torch.arange(PLACEMENTS, device=self.device)
        group = (slots >= count[:, :1]).long()
        kinds = self._counts[concept, style[:, None]].clamp(min=1)
        chosen = (torch.rand(total, 2, device=self.device) * kinds).long().minimum(kinds - 1)
        drawing = self._rows[concept, style[:, None], chosen].gather(1, group)
        standing = (ground == GRASS) | (ground == SAND) | (ground == TABLE)
        still = self._chance(_STILL, total, PLACEMENTS) | (relation == ON)[:, None]
        reach = torch.where(standing, _TURN / 3, _TURN)[:, None]
        turn = torch.where(still, 0.0, (torch.rand(total, PLACEMENTS, device=self.device) * 2 - 1) * reach)
        mirror = self._chance(0.5, total, PLACEMENTS) & self._flips[concept].gather(1, group)
        place = self._layouts.places(count, size, relation, turn, self._atlas.extent[drawing], standing)

        # The nearer object is pasted later: the first one, where it is in front of the second or stands on it.
        swap = ((relation == IN_FRONT) | (relation == ON))[:, None] & (slots < 2) & (count[:, 1:] > 0)
        order = torch.where(swap, 1 - slots, slots)
        return Scenes(
            concept=concept,
            count=count,
            tint=tint,
            size=size,
            relation=relation,
            style=style,
            ground=ground,
            top=top,
            bottom=bottom,
            styled=styled,
            named=named,
            drawing=drawing.gather(1, order),
            place=place.gather(1, order[..., None].expand(-1, -1, 3)),
            turn=turn.gather(1, order),
            mirror=mirror.gather(1, order),
            group=group.gather(1, order),
        )

    def compose(self, scenes: Scenes, side: int) -> torch.Tensor:
        """Pictures [B, 3, `side`, `side`] in [-1, 1]: sprites over grounds, premultiplied alpha."""
        pictures = torch.empty(len(scenes), 3, side, side, device=self.device)
        for part in self._chunks(len(scenes), side):
            picture = self._backdrop(scenes[part], side)
            for sprite in self._sprites(scenes[part], side):
                picture = torch.addcmul(sprite[:, :3], picture, 1 - sprite[:, 3:])
            pictures[part] = picture * 2 - 1
        return pictures

    def compose_with_owners(self, scenes: Scenes, side: int, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures as `compose` gives them, and who is seen where: float [B, 1 + P, `cells`, `cells`].

        The share of each cell's visible pixels that is the ground's (0) or a placement's (1 to P); they sum to 1.
        `side` is a multiple of `cells`.
        """
        pictures = torch.empty(len(scenes), 3, side, side, device=self.device)
        owners = torch.empty(len(scenes), 1 + PLACEMENTS, cells, cells, device=self.device)
        for part in self._chunks(len(scenes), side):
            picture = self._backdrop(scenes[part], side)
            seen = torch.zeros(len(picture), 1 + PLACEMENTS, side, side, device=self.device)
            seen[:, 0] = 1
            for index, sprite in enumerate(self._sprites(scenes[part], side), 1):
                picture = torch.addcmul(sprite[:, :3], picture, 1 - sprite[:, 3:])
                seen[:, :index] *= 1 - sprite[:, 3:]
                seen[:, index] = sprite[:, 3]
            pictures[part] = picture * 2 - 1
            owners[part] = F.avg_pool2d(seen, side // cells)
        return pictures, owners

    @staticmethod
    def _chunks(total: int, side: int) -> Iterator[slice]:
        step = max(1, min(128, _CHUNK // side**2))
        for start in range(0, total, step):
            yield slice(start, start + step)

    def _backdrop(self, scenes: Scenes, side: int) -> torch.Tensor:
        """Grounds [B, 3, H, H] in [0, 1]; what varies in them follows from where the objects happen to be."""
        key = scenes.place[:, 0, :2].sum(1) * 61 + scenes.place[:, 0, 2] * 37
        return self._grounds.draw(scenes.ground, self.colours[scenes.top], self.colours[scenes.bottom], key, side)

    def _sprites(self, scenes: Scenes, side: int) -> Iterator[torch.Tensor]:
        """Each placement's sprites alone, premultiplied [B, 4, H, H], tinted, from back to front."""
        tint = scenes.tint.gather(1, scenes.group)
        for index in range(PLACEMENTS):
            row = scenes.drawing[:, index]
            sprite = self._atlas.draw(row, scenes.place[:, index], scenes.turn[:, index], scenes.mirror[:, index], side)
            ramp = self._ramps[tint[:, index]]
            tinted = recolour(sprite[:, :3], sprite[:, 3:], self._atlas.knee[row], ramp)
            colour = torch.where((tint[:, index] > 0)[:, None, None, None], tinted, sprite[:, :3])
            yield torch.cat([colour, sprite[:, 3:]], 1)


__all__ = ["GROUNDS", "KINDS", "LARGE", "RELATIONS", "SMALL", "Scenes", "Stage"]
