"""What the default bundle can draw: the concept table and the words that name each concept."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("concepts.txt")
STYLES = ("3d", "flat")

# sRGB of the background colours; white comes last because it stands for "no background named".
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 50, 47),
    "orange": (245, 140, 40),
    "yellow": (250, 215, 70),
    "green": (70, 170, 90),
    "teal": (50, 160, 160),
    "blue": (60, 110, 220),
    "navy": (25, 40, 90),
    "purple": (130, 80, 190),
    "pink": (245, 150, 190),
    "brown": (130, 85, 50),
    "black": (15, 15, 18),
    "gray": (140, 140, 145),
    "beige": (235, 220, 190),
    "mint": (175, 235, 205),
    "sky blue": (150, 205, 245),
    "white": (255, 255, 255),
}
COLOUR_NAMES = tuple(COLOURS)
WHITE = COLOUR_NAMES.index("white")

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "gray": ("grey",),
    "sky blue": ("light blue", "pale blue"),
    "navy": ("navy blue", "dark blue"),
    "beige": ("cream", "tan"),
    "mint": ("mint green", "light green"),
    "teal": ("turquoise",),
    "purple": ("violet",),
    "orange": ("bright orange",),
    "pink": ("light pink",),
    "brown": ("dark brown",),
}


@dataclass(frozen=True)
class Concept:
    """One subject: its icon, its caption name, and the other words that mean it.

    `unseen` words are never drawn in training; they measure what the text encoder's neighbourhood alone gives.
    """

    icon: str
    name: str
    plural: str
    colours: tuple[str, ...]
    synonyms: tuple[str, ...]
    unseen: tuple[str, ...]


def pluralise(noun: str) -> str:
    """English plural by rule, for nouns whose plural is regular."""
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def article(words: str) -> str:
    """'a' or 'an' for what follows it, by sound rather than by letter."""
    sounds_consonant = re.match(r"(uni|ufo|eu|one|ukulele)", words)
    sounds_vowel = re.match(r"([aeiou]|8|hour|x-|mp3|f1)", words)
    return "an" if sounds_vowel and not sounds_consonant else "a"


def _parse(line: str) -> Concept:
    icon, name, plural, colours, synonyms = line.split("|")
    words = [word for word in synonyms.split(",") if word]
    return Concept(
        icon=icon,
        name=name,
        plural=name if plural == "=" else plural or pluralise(name),
        colours=tuple(colour for colour in colours.split(",") if colour),
        synonyms=tuple(word for word in words if not word.startswith("*")),
        unseen=tuple(word[1:] for word in words if word.startswith("*")),
    )


@cache
def load_concepts() -> tuple[Concept, ...]:
    """All concepts, in table order."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return tuple(_parse(line) for line in lines if line and not line.startswith("#"))


def select(icons: tuple[str, ...] | None) -> tuple[Concept, ...]:
    """The concepts with these icons, or all of them."""
    concepts = load_concepts()
    return concepts if icons is None else tuple(c for c in concepts if c.icon in icons)
