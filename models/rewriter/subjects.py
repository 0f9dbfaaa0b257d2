"""Which of the image model's subjects a text names: by the table of its concepts, with plurals and typos undone.

Longer phrases go before shorter ones ("hot dog" is no dog), and the words of styles, grounds, colours and relations are
known, so that "under the stars" names no star.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.training import wordings
from models.training.concepts import COLOUR_NAMES, COLOUR_WORDS, TINTS, Concept, pluralise

_SINGULAR = {
    "men": "man", "women": "woman", "people": "person", "children": "child", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "leaves": "leaf", "wolves": "wolf", "knives": "knife", "scarves": "scarf",
}  # fmt: skip
# Names of concepts that people mostly say for something else: alone they are not sure to be a subject.
_ORDINARY = frozenset((
    "adult", "agreement", "back", "bang", "blast", "box", "check", "clerk", "content", "cool", "cross", "date",
    "dawn", "deal", "desktop", "divide", "document", "end", "equal", "free", "goal", "guy", "home", "human",
    "information", "insert", "invoice", "justice", "kid", "label", "lift", "like", "link", "love", "mate", "memo",
    "mind", "motion", "movie", "music", "mute", "new", "note", "on", "opening", "package", "page", "park", "parking",
    "pause", "pick", "plane", "plus", "present", "query", "question", "record", "registered", "repeat", "resident",
    "scream", "senior", "short", "sigh", "sleeper", "spirit", "station", "statistic", "sweet", "target", "thread",
    "tick", "tie", "tool", "top", "up", "versus", "vote", "wait", "warning", "watch", "world", "wrap", "young",
))  # fmt: skip
_MENDED = 4  # letters of the shortest word that is taken for a typo of another

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A known phrase in a text: its words number `start` to `end`.

    concepts: names of those that it may mean; none for a word that only says how, where or in what style.
    sure: it means one of them, and not perhaps a colour ("orange"), a ground ("the sea") or nothing ("I would like").
    """

    key: Key
    start: int
    end: int
    concepts: frozenset[str]
    sure: bool


class Vocabulary:
    """The phrases that name concepts, and those that say something else about a picture.

    Args:
        is_word: whether some letters are a word of the language; others are mended if they are one typo away from a
            word of the vocabulary. None: nothing is mended.
    """

    def __init__(self, concepts: Sequence[Concept], is_word: Callable[[str], bool] | None = None) -> None:
        named: defaultdict[Key, set[str]] = defaultdict(set)
        for concept in concepts:
            for phrase in (*concept.words, concept.plural, *map(pluralise, concept.words)):
                named[_key(phrase)].add(concept.name)
        self._named: Mapping[Key, frozenset[str]] = {key: frozenset(names) for key, names in named.items()}
        self._other = frozenset(key for key in map(_key, _wordings()) if key)
        self._longest = max(len(key) for key in (*self._named, *self._other))
        self._is_word = is_word
        self._words = {word for key in (*self._named, *self._other) for word in key}
        self._near: defaultdict[str, set[str]] = defaultdict(set)
        for word in self._words:
            if len(word) >= _MENDED:
                for shorter in (word, *_deletions(word)):
                    self._near[shorter].add(word)

    def key(self, text: str) -> Key:
        """The words of a text, singular and mended."""
        return tuple(self._mend(word) for word in _split(text))

    def find(self, text: str) -> list[Found]:
        """Every known phrase of the text, in order, none within another."""
        words, found, start = self.key(text), [], 0
        while start < len(words):
            for end in range(min(len(words), start + self._longest), start, -1):
                key = words[start:end]
                concepts, other = self._named.get(key, frozenset()), key in self._other
                if concepts or other:
                    sure = bool(concepts) and not other and not (len(key) == 1 and key[0] in _ORDINARY)
                    found.append(Found(key, start, end, concepts, sure))
                    start = end
                    break
            else:
                start += 1
        return found

    def names(self, text: str) -> frozenset[str]:
        """Names of all concepts that the text may mean."""
        return frozenset(name for found in self.find(text) for name in found.concepts)

    def understands(self, text: str) -> bool:
        """Whether every word of the text belongs to a known phrase."""
        return sum(found.end - found.start for found in self.find(text)) == len(self.key(text))

    def _mend(self, word: str) -> str:
        """The word, singular; or the one of the vocabulary that it is a typo of, if there is just one."""
        known = singular(word)
        if known in self._words or self._is_word is None or len(word) < _MENDED or self._is_word(word):
            return known
        near = {
            other
            for each in {word, known}
            for shorter in (each, *_deletions(each))
            for other in self._near.get(shorter, ())
            if one_typo(each, other)
        }
        alike = {other for other in near if other[0] == word[0]} or near
        return alike.pop() if len(alike) == 1 else known


def singular(word: str) -> str:
    """Crudely: what matters is that a word and its plural come out alike."""
    if word in _SINGULAR:
        return _SINGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def one_typo(first: str, second: str) -> bool:
    """Whether one letter is missing, added or wrong, or two neighbours have changed places."""
    if len(first) > len(second):
        first, second = second, first
    if first == second or len(second) - len(first) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
    if len(first) < len(second):
        return first[start:] == second[start + 1 :]
    swapped = first[start + 1 : start + 2] + first[start : start + 1] == second[start : start + 2]
    return first[start + 1 :] == second[start + 1 :] or (swapped and first[start + 2 :] == second[start + 2 :])


def _deletions(word: str) -> Iterator[str]:
    return (word[:i] + word[i + 1 :] for i in range(len(word)))


def _split(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", re.sub("['\N{RIGHT SINGLE QUOTATION MARK}]", "", text.casefold()))


def _key(phrase: str) -> Key:
    return tuple(singular(word) for word in _split(phrase))


def _wordings() -> Iterator[str]:
    """Every phrase with which captions say something other than what is drawn."""
    tables: list[Mapping[Any, wordings.Options]] = [
        wordings.STYLE_WORDS, wordings.SIZES, wordings.COUNTS, wordings.NUMBERS, wordings.AFTER_VERB, wordings.BETWEEN,
        wordings.TELEGRAM_BETWEEN, wordings.VERBS, wordings.PARTICIPLES, wordings.GROUND, wordings.TELEGRAM_GROUND,
        wordings.FRONT_GROUND,
    ]  # fmt: skip
    rows = [
        wordings.LEAD, wordings.TELEGRAM_LEAD, wordings.STYLED_LEAD, wordings.STYLED_FRONT, wordings.STYLED_MANNER,
        wordings.STYLED_AFTER, wordings.FILLER, wordings.SUFFIX, wordings.TINT_AFTER, wordings.ARTICLES,
        *(row for table in tables for row in table.values()),
    ]  # fmt: skip
    for row in rows:
        for _, *phrases in row:
            yield from (re.sub(r"\{\w+\}", "", phrase) for phrase in phrases)
    yield from (*COLOUR_NAMES, *TINTS)
    yield from (f"{colour} dots" for colour in COLOUR_NAMES)  # of a ground, and no white circle
    for words in (*COLOUR_WORDS.values(), *wordings.TINT_WORDS.values(), *wordings.UNSEEN_COLOURS.values()):
        yield from words
