"""What the default bundle can draw: the concept table and the words that name each concept."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("concepts.txt")
STYLES = ("3d", "flat", "noto", "twemoji")

# The colours a tintable subject may be drawn in. Its own, natural colour is tint 0; TINTS[i] is tint i + 1.
TINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "gray")

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
    """One subject: its caption name, the other words that mean it, and the icons that draw it in each style.

    `unseen` words are never drawn in training; they measure what the text encoder's neighbourhood alone gives.
    `tintable` subjects may be drawn in any of TINTS and stay what they are; `flips` says the same of mirroring.
    `drawings` holds the icon names of each style, in the order of STYLES; none where a style does not draw it.
    """

    name: str
    plural: str
    colours: tuple[str, ...]
    synonyms: tuple[str, ...]
    unseen: tuple[str, ...]
    tintable: bool
    flips: bool
    drawings: tuple[tuple[str, ...], ...]

    @property
    def words(self) -> tuple[str, ...]:
        """Every singular wording: the name first, then synonyms, then unseen words."""
        return (self.name, *self.synonyms, *self.unseen)


_IRREGULAR = {"man": "men", "woman": "women", "person": "people", "child": "children", "foot": "feet", "tooth": "teeth"}


def pluralise(noun: str) -> str:
    """English plural by rule: of the last word, or of the one before a preposition ("faces with a monocle")."""
    if phrase := re.match(r"(.+?)( (?:with|without|in|of|on|at|from|to|behind|over) .+)", noun):
        return pluralise(phrase[1]) + phrase[2]
    before, _, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        return f"{before} {_IRREGULAR[last]}".strip()
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


def _drawings(field: str) -> tuple[tuple[str, ...], ...]:
    """Icon names for every style: those that name no style, and those that name it (`noto,twemoji:icon`)."""
    entries = [entry.rpartition(":") for entry in field.split()]
    return tuple(
        tuple(icon for named, _, icon in entries if not named or style in named.split(",")) for style in STYLES
    )


def _parse(line: str, traits: frozenset[str]) -> Concept:
    drawings, name, plural, colours, synonyms = line.split("|")
    words = [word for word in synonyms.split(",") if word]
    return Concept(
        name=name,
        plural=name if plural == "=" else plural or pluralise(name),
        colours=tuple(colour for colour in colours.split(",") if colour),
        synonyms=tuple(word for word in words if not word.startswith("*")),
        unseen=tuple(word[1:] for word in words if word.startswith("*")),
        tintable="tint" in traits,
        flips="flip" in traits,
        drawings=_drawings(drawings),
    )


@cache
def load_concepts() -> tuple[Concept, ...]:
    """All concepts, in table order; a `[heading: traits]` line says which traits the lines below it have."""
    out, traits = [], frozenset[str]()
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            traits = frozenset(line.strip("[]").partition(":")[2].split())
        elif line and not line.startswith("#"):
            out.append(_parse(line, traits))
    return tuple(out)


def select(names: tuple[str, ...] | None) -> tuple[Concept, ...]:
    """The concepts with these names, in table order, or all of them."""
    concepts = load_concepts()
    return concepts if names is None else tuple(concept for concept in concepts if concept.name in names)
