"""What a scorer's folder says about it: sizes, thresholds, and the words that its outputs stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from models.errors import ModelError


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
        for field in fields(cls):
            value = values.get(field.name)
            listed = value if field.name == "stem" and isinstance(value, list) else [value]
            if not listed or not all(type(number) is int and number > 0 for number in listed):
                raise ModelError(f"{where}: {field.name} must be a whole number above 0, not {value!r}")
            kept[field.name] = tuple(listed) if field.name == "stem" else value
        sizes = cls(**kept)
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
        if not isinstance(present, float) or not isinstance(extra, float) or not (present > 0 and extra > 0):
            raise ModelError(f"{where}: present and extra must be numbers above 0, not {present!r} and {extra!r}")
        return cls(present, extra)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words behind the outputs, in their order.

    tints: the first is an object's natural colour. relations: those that place one object against another.
    """

    names: tuple[str, ...]
    tints: tuple[str, ...]
    styles: tuple[str, ...]
    grounds: tuple[str, ...]
    colours: tuple[str, ...]
    relations: tuple[str, ...]

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: object) -> Self:
        """A vocabulary from JSON. Raises ModelError, which begins with `where`."""
        lists: dict[str, tuple[str, ...]] = {}
        for field in fields(cls):
            words = values.get(field.name)
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise ModelError(f"{where}: {field.name} must be a list of words")
            lists[field.name] = tuple(words)
        return cls(**lists)
