"""What a scorer's folder says about it: sizes, thresholds, and the words that its outputs stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from models.errors import ModelError

STEM_GROUP = 8  # channels in a group of the stem's group normalisation


@dataclass(frozen=True, slots=True)
class Sizes:
    """The image tower's sizes, and the width of the shared space.

    side: of the pictures it reads. stem: channels of the convolutional stem, each at half the side of the one before;
    one more halving leads to the tokens.
    """

    side: int
    stem: tuple[int, ...]
    width: int
    layers: int
    heads: int
    embed: int
    text_width: int

    @property
    def patch(self) -> int:
        """Side of a token's patch in pixels."""
        return int(2 ** (len(self.stem) + 1))

    @property
    def cells(self) -> int:
        """Tokens along one side."""
        return self.side // self.patch

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: object) -> Self:
        """Sizes from JSON. Raises ModelError, which begins with `where`."""
        kept: dict[str, Any] = {}
        for name in cls.__slots__:
            value = values.get(name)
            listed = value if name == "stem" and isinstance(value, list) else [value]
            if not listed or not all(type(number) is int and number > 0 for number in listed):
                raise ModelError(f"{where}: {name} must be a whole number above 0, not {value!r}")
            kept[name] = tuple(listed) if name == "stem" else value
        sizes = cls(**kept)
        if any(channels % STEM_GROUP for channels in sizes.stem):
            raise ModelError(f"{where}: stem must be multiples of {STEM_GROUP}, not {[*sizes.stem]}")
        if sizes.side % sizes.patch or sizes.width % sizes.heads:
            raise ModelError(f"{where}: side {sizes.side} and width {sizes.width} do not divide into tokens and heads")
        return sizes


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Chosen on validation renders, in objects (the density's unit).

    present: a named object is there from this much on. extra: one that was not named counts as drawn from this much on.
    """

    present: float = 0.5
    extra: float = 0.5

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: object) -> Self:
        """Thresholds from JSON. Raises ModelError, which begins with `where`."""
        present, extra = values.get("present"), values.get("extra")
        if not (isinstance(present, int | float) and isinstance(extra, int | float) and present > 0 and extra > 0):
            raise ModelError(f"{where}: present and extra must be numbers above 0, not {present!r} and {extra!r}")
        return cls(float(present), float(extra))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words behind the outputs, in their order.

    tints: the first is an object's natural colour. relations: those that place one object against another.
    own: which tints are colours that a concept has by nature, where it has one: a red ladybug need not be recoloured.
    """

    names: tuple[str, ...]
    tints: tuple[str, ...]
    styles: tuple[str, ...]
    grounds: tuple[str, ...]
    colours: tuple[str, ...]
    relations: tuple[str, ...]
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: object) -> Self:
        """A vocabulary from JSON. Raises ModelError, which begins with `where`."""
        lists = {name: _words(values.get(name), name, where) for name in cls.__slots__ if name != "own"}
        own = values.get("own")
        if not isinstance(own, dict):
            raise ModelError(f"{where}: own must map concepts to lists of words")
        return cls(**lists, own={name: _words(words, f"own '{name}'", where) for name, words in own.items()})


def _words(value: Any, what: str, where: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        raise ModelError(f"{where}: {what} must be a list of words")
    return tuple(value)
