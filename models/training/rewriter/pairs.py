"""Pairs of a prompt as people type it and the caption that the image model draws best, the same for the same seed.

The clean side is the plain wording of evaluation (`describe`), so that all prompts of one meaning share one caption.
Two things keep the order in which the prompt names them. The noisy side is a caption of training, in any of its
wordings, or a list of key words, with noise of one or several kinds.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from models.training import wordings
from models.training.captions import CaptionWriter, Slot, describe
from models.training.concepts import COLOUR_NAMES, STYLES, TINTS, Concept, article, pluralise
from models.training.grounds import COLOURED, GROUNDS
from models.training.layouts import RELATIONS
from models.training.rewriter.noise import JOIN, Noises, pick
from models.training.rewriter.scenes import Meaning, Meanings, Thing, scenes_of
from models.training.text import tiny_tower

# How a prompt is spoilt, and how many in a hundred are. All but the first two may have further noise on top.
CLEAN, FOREIGN, GRAMMAR, TYPOS, SPOKEN, CLUTTER, RAMBLING, WISHES, ORDER, SYNONYMS = KINDS = (
    "clean", "foreign", "grammar", "typos", "spoken", "clutter", "rambling", "wishes", "order", "synonyms",
)  # fmt: skip
_SHARES = (6, 6, 10, 16, 12, 12, 10, 10, 10, 8)
_FURTHER = 0.25  # of each kind of further noise
_ROUNDS = 64  # of drawing meanings until all captions fit
_NUMBERS = ((), ("",), ("two", "2"), ("three", "3"), ("four", "4"), ("five", "5"))
_BACKGROUND_SLOTS = Slot.GROUND - Slot.ON + 1  # these five stand first in some captions


@dataclass(frozen=True, slots=True)
class Pair:
    """meaning: None for a foreign subject, whose caption is the prompt itself."""

    prompt: str
    caption: str
    kind: str
    meaning: Meaning | None


@dataclass(frozen=True, slots=True)
class _Draft:
    """A prompt in the making: its words, and each thing's as they stand in it."""

    text: str
    meaning: Meaning
    nouns: tuple[str, ...]


class PairWriter:
    """Writes pairs for these concepts.

    Args:
        fits: whether the image model reads all of a caption.
        unseen: noise and words that are kept out of training.
    """

    def __init__(self, concepts: Sequence[Concept], fits: Callable[[str], bool], unseen: bool = False) -> None:
        self.concepts = tuple(concepts)
        self._meanings, self._fits, self._unseen = Meanings(concepts), fits, unseen
        # Not told of natural colours, the writer adds none that the meaning does not have.
        uncoloured = [replace(concept, colours=()) for concept in concepts]
        self._writer = CaptionWriter(uncoloured, tiny_tower([], torch.device("cpu")), unseen)
        self._phrases = [
            {phrase for _, *forms in CaptionWriter._words_for(concept) for phrase in forms} for concept in concepts
        ]
        self._words = {word for concept in concepts for phrase in concept.words for word in phrase.split()}

    def write(self, seed: str, count: int, kinds: Sequence[str] = KINDS) -> list[Pair]:
        """`count` pairs of meanings of their own, of these kinds in their usual shares."""
        rng = random.Random(seed)
        return self._word(rng, self._fitting(rng, count), kinds)

    def word(self, seed: str, meanings: Sequence[Meaning], kinds: Sequence[str]) -> list[Pair]:
        """A pair of each meaning, of one of these kinds each."""
        return self._word(random.Random(seed), meanings, kinds)

    def _word(self, rng: random.Random, meanings: Sequence[Meaning], kinds: Sequence[str]) -> list[Pair]:
        chosen = rng.choices(kinds, [_SHARES[KINDS.index(kind)] for kind in kinds], k=len(meanings))
        drafts = self._drafts(rng, meanings)
        captions = describe(scenes_of([draft.meaning for draft in drafts]), self.concepts)
        noises = Noises(rng, self._words, self._unseen)
        out = []
        for draft, caption, kind in zip(drafts, captions, chosen, strict=True):
            if kind == FOREIGN:
                text = noises.foreign()
                out.append(Pair(text, text, kind, None))
            elif kind == CLEAN:
                out.append(Pair(caption, caption, kind, draft.meaning))
            else:
                out.append(Pair(self._spoilt(rng, noises, draft, kind), caption, kind, draft.meaning))
        return out

    def _fitting(self, rng: random.Random, count: int) -> list[Meaning]:
        """Meanings whose captions the image model reads to the end."""
        kept: list[Meaning] = []
        for _ in range(_ROUNDS):
            drawn = [self._meanings.draw(rng) for _ in range(count - len(kept))]
            captions = describe(scenes_of(drawn), self.concepts)
            kept += [meaning for meaning, caption in zip(drawn, captions, strict=True) if self._fits(caption)]
            if len(kept) == count:
                return kept
        raise ValueError("hardly any caption of these concepts fits the image model's text encoder")

    def _drafts(self, rng: random.Random, meanings: Sequence[Meaning]) -> list[_Draft]:
        """Each meaning in some wording of training, with its things in the order in which that names them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.getrandbits(32))
            slots = self._writer.draft(scenes_of(meanings))
        table, drafts = self._writer.phrases.texts, []
        for meaning, row in zip(meanings, slots.tolist(), strict=True):
            known = {phrase for thing in meaning.things for phrase in self._phrases[thing.concept]}
            noun = Slot.NOUN if table[row[Slot.NOUN]] in known else Slot.NOUN + _BACKGROUND_SLOTS
            places = [noun, noun + Slot.NOUN2 - Slot.NOUN][: len(meaning.things)]
            if table[row[noun]] not in self._phrases[meaning.things[0].concept]:
                meaning = meaning.reversed() or meaning
            phrases = [table[i].replace(" ", JOIN) if place in places else table[i] for place, i in enumerate(row)]
            text = " ".join(phrase for phrase in phrases if phrase).replace(" ,", ",").replace(" .", ".")
            drafts.append(_Draft(text, meaning, tuple(phrases[place] for place in places)))
        return drafts

    def _spoilt(self, rng: random.Random, noises: Noises, draft: _Draft, kind: str) -> str:
        """The draft's words with noise of this kind and perhaps of others."""
        if kind in (ORDER, SYNONYMS):
            draft = self._key_words(rng, draft.meaning, other_words=kind == SYNONYMS)

        def wanted(noise: str) -> bool:
            return kind == noise or (kind != GRAMMAR and rng.random() < _FURTHER)

        text = draft.text
        if kind == WISHES or (kind != GRAMMAR and rng.random() < _FURTHER / 2):
            text = noises.wishes(text, rng.choice(draft.nouns))
        text = noises.spoken(text) if wanted(SPOKEN) else text
        text = noises.bare(text) if wanted("bare") else text
        text = noises.typos(text) if wanted(TYPOS) else text
        text = noises.clutter(text) if wanted(CLUTTER) else text
        text = noises.rambling(text) if kind == RAMBLING else text
        return noises.typed(text.replace(JOIN, " "))

    def _key_words(self, rng: random.Random, meaning: Meaning, other_words: bool) -> _Draft:
        """The meaning as a list of key words in any order; with `other_words` in reading order, by synonyms."""
        nouns = [self._noun(rng, thing, other_words) for thing in meaning.things]
        groups = [self._group(rng, thing, noun) for thing, noun in zip(meaning.things, nouns, strict=True)]
        between = [text for _, text, *after in wordings.TELEGRAM_BETWEEN[RELATIONS[meaning.relation]] if not after]
        parts = [f" {rng.choice(between)} ".join(groups)]
        if meaning.ground is not None:
            parts.append(self._ground(rng, meaning))
        if meaning.style is not None:
            word = pick(rng, [text for _, text, *_ in wordings.STYLE_WORDS[STYLES[meaning.style]]], self._unseen)
            parts.append(f"{word}{rng.choice((' style', ' style', ' emoji', ''))}")
        if not other_words:
            rng.shuffle(parts)
        text = rng.choice((", ", ", ", " - ", "; ")).join(parts).replace(" ,", ",")
        return _Draft(text, meaning, tuple(nouns))

    def _noun(self, rng: random.Random, thing: Thing, other_words: bool) -> str:
        concept = self.concepts[thing.concept]
        others = (concept.unseen if self._unseen else concept.synonyms) if other_words else ()
        if not others:
            return (concept.plural if thing.count > 1 else concept.name).replace(" ", JOIN)
        word = rng.choice(others)
        several = thing.count > 1 and not re.search(r"[^sui]s$", word)  # "jeans" are plural already
        return (pluralise(word) if several else word).replace(" ", JOIN)

    @staticmethod
    def _group(rng: random.Random, thing: Thing, noun: str) -> str:
        """Count, size, colour and noun, the size sometimes behind it."""
        size = ("", "small", "large")[thing.size]
        colour = ("", *TINTS)[thing.tint]
        words = [rng.choice(_NUMBERS[thing.count]), size, colour, noun]
        if size and rng.random() < 0.3:
            words = [words[0], colour, noun, f"({size})"]
        text = " ".join(word for word in words if word)
        return f"{article(text)} {text}" if thing.count == 1 and rng.random() < 0.3 else text

    def _ground(self, rng: random.Random, meaning: Meaning) -> str:
        ground = GROUNDS[meaning.ground or 0]
        if (meaning.ground or 0) >= COLOURED:
            phrases = [text for table in (wordings.GROUND, wordings.TELEGRAM_GROUND) for _, text, *_ in table[ground]]
            return pick(rng, phrases, self._unseen).removeprefix(", ")
        top, bottom = COLOUR_NAMES[meaning.top], COLOUR_NAMES[meaning.bottom]
        shapes = {
            "plain": ("{} background", "{} bg", "{} backdrop", "background {}"),
            "gradient": ("{} to {} gradient", "gradient {} to {}", "{} {} gradient background"),
            "stripes": ("{} and {} stripes", "stripes {} {}", "{} {} striped background"),
            "dots": ("{} background with {} dots", "{} with {} polka dots", "{} bg {} dots"),
        }
        return rng.choice(shapes[ground]).format(top, bottom)
