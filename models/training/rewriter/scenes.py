"""What a prompt asks for, apart from how it is put: drawn at random, and told in the recipe's own plain words.

Meanings follow the scenes that the image model was trained on (models.training.scenes), without their pictures, so that
no sprites are needed to make them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from models.training.concepts import COLOUR_NAMES, STYLES, TINTS, WHITE, Concept
from models.training.grounds import COLOURED, GROUNDS, PLAIN
from models.training.layouts import AND, BEHIND, RELATIONS
from models.training.prompts import Record
from models.training.scenes import Scenes

_STYLED, _NAMED = 0.45, 0.7  # people name a style and a background less often than the captions of training do
_CONVERSE = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above", "behind": "in front of",
    "in front of": "behind", "and": "and",
}  # fmt: skip
_SIZES = (None, "small", "large")
_MIXTURES = ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (3, 2), (2, 3), (4, 1), (1, 4))


@dataclass(frozen=True, slots=True)
class Thing:
    """One group of a picture; numbers as in Scenes."""

    concept: int
    count: int = 1
    tint: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Meaning:
    """One or two things, the relation of the first to the second, a style and a ground, None where nothing is said."""

    things: tuple[Thing, ...]
    relation: int = AND
    style: int | None = None
    ground: int | None = None
    top: int = WHITE
    bottom: int = WHITE

    def reversed(self) -> "Meaning | None":
        """The same, told from the second thing; None where that cannot be put as a relation ("on")."""
        converse = _CONVERSE.get(RELATIONS[self.relation])
        if converse is None:
            return None
        return replace(self, things=self.things[::-1], relation=RELATIONS.index(converse))


class Meanings:
    """Draws meanings of these concepts."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.concepts = tuple(concepts)
        self._drawn = [[style for style in range(len(STYLES)) if concept.drawings[style]] for concept in self.concepts]

    def draw(self, rng: random.Random) -> Meaning:
        """Kinds of scenes in about the shares of training; every thing is drawn in the style, if one is named."""
        kind = rng.random()
        first = self._thing(rng, rng.randrange(len(self.concepts)))
        things: tuple[Thing, ...] = (first,)
        relation, styles = AND, self._drawn[first.concept]
        if kind < 0.3:
            second = self._thing(rng, rng.randrange(len(self.concepts)))
            common = [style for style in styles if style in self._drawn[second.concept]]
            # The same word said of both would name neither.
            if common and second.concept != first.concept:
                things, styles = (first, second), common
                relation = rng.choice((AND, rng.randrange(len(RELATIONS))))
                if relation < BEHIND and rng.random() < 0.25:
                    counts = rng.choice(_MIXTURES)
                    things = (replace(first, count=counts[0]), replace(second, count=counts[1]))
        elif kind < 0.5:
            things = (replace(first, count=rng.randrange(2, 6)),)
        # Unnamed it is 3d, and what 3d does not draw needs a name.
        style = rng.choice(styles) if rng.random() < _STYLED or 0 not in styles else None
        ground, top, bottom = self._ground(rng) if rng.random() < _NAMED else (None, WHITE, WHITE)
        return Meaning(things, relation, style, ground, top, bottom)

    def _thing(self, rng: random.Random, concept: int) -> Thing:
        tinted = self.concepts[concept].tintable and rng.random() < 0.35
        size = rng.choice((1, 2)) if rng.random() < 0.2 else 0
        return Thing(concept, tint=rng.randrange(1, len(TINTS) + 1) if tinted else 0, size=size)

    @staticmethod
    def _ground(rng: random.Random) -> tuple[int, int, int]:
        """A ground and its colours. Half of them are plain, as people ask for them."""
        ground = PLAIN if rng.random() < 0.5 else rng.randrange(1, len(GROUNDS))
        if ground >= COLOURED:
            return ground, WHITE, WHITE
        top, bottom = rng.sample(range(len(COLOUR_NAMES)), 2)
        return ground, top, top if ground == PLAIN else bottom


def scenes_of(meanings: Sequence[Meaning]) -> Scenes:
    """The meanings as scenes without drawings, which is what captions are written from."""
    things = [(*meaning.things, replace(meaning.things[0], count=0))[:2] for meaning in meanings]
    count = len(meanings)
    nothing = torch.zeros(count, 0)
    return Scenes(
        **{
            name: torch.tensor([[getattr(thing, name) for thing in pair] for pair in things])
            for name in ("concept", "count", "tint", "size")
        },
        relation=torch.tensor([meaning.relation for meaning in meanings]),
        style=torch.tensor([meaning.style or 0 for meaning in meanings]),
        ground=torch.tensor([meaning.ground or PLAIN for meaning in meanings]),
        top=torch.tensor([meaning.top for meaning in meanings]),
        bottom=torch.tensor([meaning.bottom for meaning in meanings]),
        styled=torch.tensor([meaning.style is not None for meaning in meanings]),
        named=torch.tensor([meaning.ground is not None for meaning in meanings]),
        drawing=nothing.long(),
        place=nothing[..., None],
        turn=nothing,
        mirror=nothing.bool(),
        group=nothing.long(),
    )


def record_of(meaning: Meaning, concepts: Sequence[Concept]) -> Record:
    """What models.training.prompts records of a picture, without the prompt and its place in a file."""
    colours = [] if meaning.ground is None or meaning.ground >= COLOURED else [meaning.top, meaning.bottom]
    if meaning.ground == PLAIN:
        colours = colours[:1]
    background: dict[str, Any] | None = None
    if meaning.ground is not None:
        background = {"ground": GROUNDS[meaning.ground], "colours": [COLOUR_NAMES[colour] for colour in colours]}
    return {
        "objects": [
            {
                "concept": concepts[thing.concept].name,
                "count": thing.count,
                "colour": TINTS[thing.tint - 1] if thing.tint else None,
                "size": _SIZES[thing.size],
            }
            for thing in meaning.things
        ],
        "relation": RELATIONS[meaning.relation] if len(meaning.things) == 2 else None,
        "style": None if meaning.style is None else STYLES[meaning.style],
        "background": background,
    }
