"""What a caption says, fact by fact, and how many of a pair's facts an answer has."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from models.rewriter.subjects import Vocabulary
from models.training import wordings
from models.training.concepts import COLOUR_NAMES, TINTS
from models.training.grounds import COLOURED, GROUNDS
from models.training.layouts import RELATIONS
from models.training.rewriter.pairs import Pair

_COUNTS = {"two": 2, "2": 2, "three": 3, "3": 3, "four": 4, "4": 4, "five": 5, "5": 5}
_COLOUR = f"({'|'.join(COLOUR_NAMES)})"
_GROUNDS = {
    **{ground: re.escape(f" {wordings.GROUND[ground][0][1]}") for ground in GROUNDS[COLOURED:]},
    "dots": rf" on an? {_COLOUR} background with {_COLOUR} dots",
    "stripes": rf" on {_COLOUR} and {_COLOUR} stripes",
    "gradient": rf" on an? {_COLOUR} to {_COLOUR} gradient",
    "plain": rf" on an? {_COLOUR} background",
}
_RELATIONS = {"left of": "to the left of", "right of": "to the right of"}

Facts = frozenset[tuple[str, ...]]
SUBJECT = "subject"


def facts_of(caption: str, vocabulary: Vocabulary) -> Facts:
    """The facts of a caption in the plain wording: subjects with counts, colours and sizes, and the rest of the scene.

    Of another text, those that it happens to put as captions do.
    """
    facts: set[tuple[str, ...]] = set()
    text = caption.casefold()
    if style := re.search(r",? (\w+) style\b", text):
        facts.add(("style", style[1]))
        text = text.replace(style[0], "")
    for ground, pattern in _GROUNDS.items():
        if found := re.search(rf"{pattern}$", text):
            facts.add(("ground", ground, *found.groups()))
            text = text.replace(found[0], "")
            break
    words, start, names = vocabulary.key(text), 0, list[str]()
    spans = [found for found in vocabulary.find(text) if found.concepts]
    for i, span in enumerate(spans):
        if not span.sure and i + 1 < len(spans) and spans[i + 1].start == span.end:
            continue  # "orange" before a subject is its colour
        name = min(span.concepts)
        facts.add((SUBJECT, name))
        before = words[start : span.start]
        facts.add(("count", name, str(next((_COUNTS[word] for word in before if word in _COUNTS), 1))))
        facts |= {("colour", name, colour) for colour in TINTS if colour in before}
        facts |= {("size", name, size) for size in ("small", "large") if size in before}
        if names:
            between = " ".join(before)
            told = [r for r in RELATIONS if re.search(rf"\b{_RELATIONS.get(r, r)}\b", between)]
            facts |= {("relation", names[-1], max(told, key=len), name)} if told else set()
        names.append(name)
        start = span.end
    return frozenset(facts)


@dataclass(frozen=True, slots=True)
class Score:
    """Shares over n pairs.

    exact: answers that are the caption itself. subject: those that name the caption's subjects, or repeat a foreign
    prompt. attributes: mean share of a caption's other facts that the answer has. invented: answers that say what the
    caption does not.
    """

    n: int
    exact: float
    subject: float
    attributes: float
    invented: float


def score(pairs: Sequence[Pair], answers: Sequence[str], vocabulary: Vocabulary) -> Score:
    """How well the answers match the pairs' captions."""
    exact = subject = invented = 0
    shares: list[float] = []
    for pair, answer in zip(pairs, answers, strict=True):
        exact += answer == pair.caption
        if pair.meaning is None:
            subject += answer == pair.caption
            continue
        wanted, found = facts_of(pair.caption, vocabulary), facts_of(answer, vocabulary)
        subjects = {fact for fact in wanted if fact[0] == SUBJECT}
        subject += subjects <= found
        invented += not found <= wanted
        shares.append(len((wanted - subjects) & found) / len(wanted - subjects))
    n = len(pairs)
    return Score(n, exact / n, subject / n, sum(shares) / max(1, len(shares)), invented / n)


def figures(pairs: Sequence[Pair], answers: Sequence[str], vocabulary: Vocabulary) -> dict[str, Any]:
    """Scores of all pairs and of every kind, fit for JSON."""
    kinds = {
        kind: [i for i, pair in enumerate(pairs) if pair.kind == kind]
        for kind in dict.fromkeys(pair.kind for pair in pairs)
    }
    return {
        "all": asdict(score(pairs, answers, vocabulary)),
        "kinds": {
            kind: asdict(score([pairs[i] for i in rows], [answers[i] for i in rows], vocabulary))
            for kind, rows in kinds.items()
        },
    }
