"""Captions as people might word them, assembled on the device as token ids from a table of phrases.

A caption is a row of slots, each holding one phrase (0 is the empty phrase). Slots are filled by weighted choice, put
in one of two orders, and their tokens are packed between [CLS] and [SEP]. Every scene is worded a few times at once,
the last time in telegram style, and the first wording short enough for the text encoder stays.

Shapes: B captions; S slots.
"""

import re
from collections.abc import Sequence
from enum import IntEnum

import torch

from models.training import wordings
from models.training.concepts import COLOUR_NAMES, COLOUR_WORDS, STYLES, TINTS, Concept, article, pluralise
from models.training.phrases import Choices, Phrases, Shares
from models.training.scenes import GROUNDS, RELATIONS, Scenes
from models.training.text import LENGTH, TextTower
from models.training.wordings import Option, Options


class Slot(IntEnum):
    """The slots in their usual order; those of the second group follow those of the first at a fixed distance."""

    FRONT = 0
    LEAD = 1
    COUNT = 2
    SIZE = 3
    FILLER = 4
    STYLE = 5
    TINT = 6
    NOUN = 7
    SUFFIX = 8
    TINT_AFTER = 9
    TINT_LATE = 10
    VERB = 11
    BETWEEN = 12
    COUNT2 = 13
    SIZE2 = 14
    FILLER2 = 15
    STYLE2 = 16
    TINT2 = 17
    NOUN2 = 18
    SUFFIX2 = 19
    TINT_AFTER2 = 20
    TINT_LATE2 = 21
    BETWEEN_END = 22
    MANNER = 23
    ON = 24
    TOP = 25
    TO = 26
    BOTTOM = 27
    GROUND = 28
    AFTER = 29
    STOP = 30


_SECOND = Slot.COUNT2 - Slot.COUNT
_BACKGROUND = (Slot.ON, Slot.TOP, Slot.TO, Slot.BOTTOM, Slot.GROUND)
_BACKGROUND_FIRST = (*_BACKGROUND, *(slot for slot in Slot if slot not in _BACKGROUND))
_ATTEMPTS = 3

PHRASE, TELEGRAM, SENTENCE = range(3)
_FORMS = (64, 20, 16)
# Where a style is named, by form.
_STYLE_SLOTS = (Slot.STYLE, Slot.LEAD, Slot.MANNER, Slot.AFTER, Slot.FRONT)
_STYLE_PLACES = ((40, 14, 14, 24, 8), (50, 0, 0, 40, 10), (46, 0, 14, 30, 10))

# Relations as told: RELATIONS, "on" from below, and no second group.
_TOLD = (*RELATIONS, "under", "")
_CONVERSE = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above", "behind": "in front of",
    "in front of": "behind", "on": "under", "and": "and",
}  # fmt: skip
_BACKWARDS = 0.3
_COLOURED = GROUNDS.index("dots") + 1  # grounds before this one bear colours, of which the plain one has one

_UNCHANGED_PLURAL = re.compile(r"(fish|deer|moose|sheep|squid|shrimp|bison|salmon|craft|thumbs up|thumbs down)$")


def _plural(word: str) -> str:
    """Plural of a synonym; those plural already stay as they are."""
    if " of " in word:
        head, _, rest = word.partition(" of ")
        return f"{_plural(head)} of {rest}"
    return word if _is_plural(word) else pluralise(word)


def _is_plural(word: str) -> bool:
    return re.search(r"[^sui]s$", word.partition(" of ")[0]) is not None


def _takes_article(word: str, concept: Concept) -> bool:
    """Whether 'a' may stand before a word for one thing: not before plurals ('jeans') or stuff ('bacon')."""
    if word == concept.name or " of " not in word:
        uncounted = concept.plural == concept.name and not _UNCHANGED_PLURAL.search(concept.name)
    else:
        uncounted = False
    return not uncounted and (word == concept.name or not _is_plural(word))


def _named(name: str, *others: Sequence[str], usual: float) -> list[Option]:
    """The name with weight `usual`, its trained other words sharing the rest, then starred ones for unseen words."""
    trained, unseen = others
    rest = [((1 - usual) / len(trained), word) for word in trained]
    return [(usual, name), *rest, *((1.0, f"*{word}") for word in unseen)]


def _in_style(templates: Options, style: str) -> list[Option]:
    """The templates filled with every adjective of a style."""
    filled: list[Option] = []
    for weight, template, *_ in templates:
        for share, word, *_ in wordings.STYLE_WORDS[style]:
            adjective = word.removeprefix("*")
            text = template.format(style=adjective, a=article(adjective))
            # Of templates and adjectives, at most one is unseen in one caption.
            if not (template.startswith("*") and word.startswith("*")):
                filled.append((weight * share, f"*{text}" if word.startswith("*") else text))
    return filled


def _on_ground(options: Options) -> list[Option]:
    """Background options as (before, before with 'an', between, after)."""
    filled: list[Option] = []
    for weight, before, *rest in options:
        between, after = rest or ("", "")
        filled.append((weight, before.format(a="a"), before.format(a="an"), between, after))
    return filled


def _own_colours(concepts: Sequence[Concept]) -> list[Options]:
    """What each concept's natural colour may be called, where that does not name another concept ("green apple")."""
    taken = {word for concept in concepts for word in concept.words}
    rows: list[Options] = []
    for concept in concepts:
        # Of several colours, a drawing may have any one.
        certain = concept.colours if len(concept.colours) == 1 else ()
        colours = [colour for colour in certain if taken.isdisjoint(f"{colour} {word}" for word in concept.words)]
        rows.append([(0.85, ""), *((0.15 / len(colours), colour) for colour in colours)])
    return rows


class CaptionWriter:
    """Writes one random caption per scene; with `unseen`, starred wordings are used too."""

    def __init__(self, concepts: Sequence[Concept], tower: TextTower, unseen: bool = False) -> None:
        self.phrases = phrases = Phrases()
        self._tower, self._device = tower, tower.device

        def choices(rows: Sequence[Options]) -> Choices:
            return Choices(rows, phrases, tower.device, unseen)

        self._forms, self._places = Shares([_FORMS], tower.device), Shares(_STYLE_PLACES, tower.device)
        self._lead = choices(
            [wordings.LEAD, [(w, text, text) for w, text, *_ in wordings.TELEGRAM_LEAD], [(1, "", "")]]
        )
        self._styled = {
            Slot.STYLE: choices([wordings.STYLE_WORDS[style] for style in STYLES]),
            Slot.LEAD: choices([_in_style(wordings.STYLED_LEAD, style) for style in STYLES]),
            Slot.MANNER: choices([_in_style(wordings.STYLED_MANNER, style) for style in STYLES]),
            Slot.AFTER: choices([_in_style(wordings.STYLED_AFTER, style) for style in STYLES]),
            Slot.FRONT: choices([_in_style(wordings.STYLED_FRONT, style) for style in STYLES]),
        }
        self._filler, self._suffix = choices([wordings.FILLER]), choices([wordings.SUFFIX])
        self._sizes = choices([[(1, "")], wordings.SIZES["small"], wordings.SIZES["large"]])
        self._nouns = choices([self._words_for(concept) for concept in concepts])
        self._own_colours = choices(_own_colours(concepts))
        self._tints = choices(
            [[(1, "")]]
            + [_named(t, wordings.TINT_WORDS.get(t, ()), wordings.UNSEEN_COLOURS.get(t, ()), usual=0.8) for t in TINTS]
        )
        self._tint_after = choices([wordings.TINT_AFTER])
        nothing: Options = [(1, "")]
        self._counts = choices([nothing, nothing, *(wordings.COUNTS[n] for n in range(2, 6))])
        self._numbers = choices([nothing, nothing, *(wordings.NUMBERS[n] for n in range(2, 6))])
        self._articles = choices([wordings.ARTICLES])
        verbs = [wordings.PARTICIPLES, {}, wordings.VERBS]
        self._verbs = choices(
            [[(o[0], o[1], o[-1]) for o in table.get(told, nothing)] for table in verbs for told in _TOLD]
        )
        between = [wordings.BETWEEN, wordings.TELEGRAM_BETWEEN, wordings.AFTER_VERB]
        self._between = choices([table.get(told, nothing) for table in between for told in _TOLD])
        grounds = [wordings.GROUND, wordings.TELEGRAM_GROUND, wordings.FRONT_GROUND]
        self._grounds = choices([_on_ground(table[ground]) for table in grounds for ground in GROUNDS])
        self._colours = choices(
            [_named(c, COLOUR_WORDS.get(c, ()), wordings.UNSEEN_COLOURS.get(c, ()), usual=0.75) for c in COLOUR_NAMES]
        )
        self._stop = choices([wordings.STOP, wordings.STOP, wordings.SENTENCE_STOP])
        self._converse = torch.tensor([_TOLD.index(_CONVERSE[r]) for r in RELATIONS], device=tower.device)
        self._orders = torch.tensor([list(Slot), _BACKGROUND_FIRST], device=tower.device)
        self._finish(concepts, phrases, tower)

    @staticmethod
    def _words_for(concept: Concept) -> list[Option]:
        """Singular and plural of the concept's name and synonyms."""
        others = concept.synonyms
        return [
            (0.7, concept.name, concept.plural),
            *((0.3 / len(others), word, _plural(word)) for word in others),
        ]

    def _finish(self, concepts: Sequence[Concept], phrases: Phrases, tower: TextTower) -> None:
        """Tokenise the finished phrase table and note what articles and verbs need to know of each phrase."""
        pieces = [tower.pieces(text) for text in phrases.texts]
        width = max(len(row) for row in pieces)
        table = [[*row, *([tower.pad] * (width - len(row)))] for row in pieces]
        self._pieces = torch.tensor(table, device=tower.device)
        self._lengths = torch.tensor([len(row) for row in pieces], device=tower.device)
        self._vowel = torch.tensor([article(text) == "an" for text in phrases.texts], device=tower.device)
        words = {word: concept for concept in reversed(concepts) for word in (*concept.synonyms, concept.name)}
        counted = [text in words and _takes_article(text, words[text]) for text in phrases.texts]
        self._counted = torch.tensor(counted, device=tower.device)
        self._several = torch.tensor(
            [text in words and not yes and _is_plural(text) for text, yes in zip(phrases.texts, counted, strict=True)],
            device=tower.device,
        )

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.long, device=self._device)

    def _chance(self, count: int, probability: float) -> torch.Tensor:
        return torch.rand(count, device=self._device) < probability

    def slots(self, scenes: Scenes) -> torch.Tensor:
        """Phrase ids [B, S], in reading order."""
        count = len(scenes)
        drafts = self.draft(scenes[torch.arange(count, device=self._device).repeat_interleave(_ATTEMPTS)])
        length = self._lengths[drafts].sum(1).view(count, _ATTEMPTS)
        fits = length <= LENGTH - 2
        best = torch.where(fits.any(1), fits.int().argmax(1), length.argmin(1))
        return drafts.view(count, _ATTEMPTS, len(Slot))[torch.arange(count, device=self._device), best]

    def draft(self, scenes: Scenes) -> torch.Tensor:
        """One wording of each scene, of any length; the last of every few is in telegram style."""
        count = len(scenes)
        form = self._forms.draw(self._zeros(count))
        form[_ATTEMPTS - 1 :: _ATTEMPTS] = TELEGRAM
        out = dict.fromkeys(Slot, self._zeros(count))
        self._write_style(scenes, form, out)
        backwards = (scenes.relation > 0) & self._chance(count, _BACKWARDS)
        first, second = backwards.long(), 1 - backwards.long()
        several = self._write_group(scenes, first, form, out, 0)
        self._write_group(scenes, second, form, out, _SECOND)
        self._write_opening(form, several, out)
        self._write_relation(scenes, backwards, form, several, out)
        front = self._write_background(scenes, form, out)
        out[Slot.STOP] = self._stop.draw(form)[:, 0]
        rows = torch.stack([out[slot] for slot in Slot], 1)
        return rows.gather(1, self._orders[front.long()])

    def _write_style(self, scenes: Scenes, form: torch.Tensor, out: dict[Slot, torch.Tensor]) -> None:
        """Name the style in one place; as an adjective now and then before both groups."""
        place = self._places.draw(form)
        for number, slot in enumerate(_STYLE_SLOTS):
            here = scenes.styled & (place == number)
            out[slot] = torch.where(here, self._styled[slot].draw(scenes.style)[:, 0], 0)
        again = (scenes.count[:, 1] > 0) & self._chance(len(scenes), 0.3)
        out[Slot.STYLE2] = torch.where(again, out[Slot.STYLE], 0)

    def _write_opening(self, form: torch.Tensor, several: torch.Tensor, out: dict[Slot, torch.Tensor]) -> None:
        """Something to open with, unless the style did."""
        lead = self._lead.draw(form)
        lead = torch.where(several, lead[:, 1], lead[:, 0])
        out[Slot.LEAD] = torch.where(out[Slot.LEAD] > 0, out[Slot.LEAD], lead)
        out[Slot.SUFFIX] = torch.where(out[Slot.LEAD] > 0, 0, out[Slot.SUFFIX])  # no "emoji of a cat emoji"

    def _write_group(
        self, scenes: Scenes, group: torch.Tensor, form: torch.Tensor, out: dict[Slot, torch.Tensor], shift: int
    ) -> torch.Tensor:
        """One group from its count to its colour; returns bool [B]: grammar takes it for several things."""
        rows = torch.arange(len(group), device=self._device)
        concept, number, tint, size = (
            field[rows, group] for field in (scenes.concept, scenes.count, scenes.tint, scenes.size)
        )
        here, many = number > 0, number > 1
        nouns = self._nouns.draw(concept)
        singular, noun = nouns[:, 0], torch.where(many, nouns[:, 1], nouns[:, 0])
        several = many | self._several[singular]
        colour = torch.where(tint > 0, self._tints.draw(tint)[:, 0], self._own_colours.draw(concept)[:, 0])
        late = (tint > 0) & (form != TELEGRAM) & self._chance(len(group), 0.15)
        after = self._tint_after.draw(self._zeros(len(group)))
        alone = here & ~many & (scenes.count[:, 1] == 0)
        words = {
            Slot.SIZE: self._sizes.draw(size)[:, 0],
            Slot.FILLER: self._filler.draw(self._zeros(len(group)))[:, 0],
            Slot.STYLE: out[Slot(Slot.STYLE + shift)],
            Slot.TINT: torch.where(late, 0, colour),
            Slot.NOUN: noun,
        }
        following = torch.stack(list(words.values()), 1)
        head = following.gather(1, (following > 0).int().argmax(1, keepdim=True))[:, 0]
        options = self._articles.draw(self._zeros(len(group)))
        one = torch.where(self._vowel[head], options[:, 1], options[:, 0])
        one = torch.where(self._counted[singular] & (form != TELEGRAM), one, 0)
        plain = (form == TELEGRAM) | ~self._counted[singular]
        some = torch.where(plain, self._numbers.draw(number)[:, 0], self._counts.draw(number)[:, 0])
        words |= {
            Slot.COUNT: torch.where(many, some, one),
            Slot.SUFFIX: torch.where(alone, self._suffix.draw(self._zeros(len(group)))[:, 0], 0),
            Slot.TINT_AFTER: torch.where(late, torch.where(several, after[:, 1], after[:, 0]), 0),
            Slot.TINT_LATE: torch.where(late, colour, 0),
        }
        out.update({Slot(slot + shift): torch.where(here, phrase, 0) for slot, phrase in words.items()})
        return several

    def _write_relation(
        self,
        scenes: Scenes,
        backwards: torch.Tensor,
        form: torch.Tensor,
        several: torch.Tensor,
        out: dict[Slot, torch.Tensor],
    ) -> None:
        """How the groups stand to each other, with a verb in sentences and a participle now and then."""
        told = torch.where(backwards, self._converse[scenes.relation], scenes.relation)
        told = torch.where(scenes.count[:, 1] > 0, told, len(_TOLD) - 1)
        verbs = self._verbs.draw(form * len(_TOLD) + told)
        verb = torch.where(several, verbs[:, 1], verbs[:, 0])
        kind = torch.where(verb > 0, SENTENCE, form)
        between = self._between.draw(kind * len(_TOLD) + told)
        out[Slot.VERB], out[Slot.BETWEEN], out[Slot.BETWEEN_END] = verb, between[:, 0], between[:, 1]

    def _write_background(self, scenes: Scenes, form: torch.Tensor, out: dict[Slot, torch.Tensor]) -> torch.Tensor:
        """Fill the background's slots; returns bool [B]: the background comes first."""
        front = scenes.named & self._chance(len(scenes), 0.1)
        kind = torch.where(front, 2, (form == TELEGRAM).long())
        drawn = self._grounds.draw(kind * len(GROUNDS) + scenes.ground)
        top, bottom = (self._colours.draw(colour)[:, 0] for colour in (scenes.top, scenes.bottom))
        before = torch.where(self._vowel[top], drawn[:, 1], drawn[:, 0])
        coloured = scenes.ground < _COLOURED
        two = coloured & (scenes.ground > 0)
        parts = (before, torch.where(coloured, top, 0), drawn[:, 2], torch.where(two, bottom, 0), drawn[:, 3])
        out.update({slot: torch.where(scenes.named, part, 0) for slot, part in zip(_BACKGROUND, parts, strict=True)})
        return front

    def tokens(self, slots: torch.Tensor) -> torch.Tensor:
        """Token ids [B, LENGTH] of rows of phrases, as the tokenizer gives for the same text."""
        count, tower = len(slots), self._tower
        body = self._pieces[slots].reshape(count, -1)
        blank = body == tower.pad
        order = blank.to(torch.int8).argsort(dim=1, stable=True)[:, : LENGTH - 1]
        body = body.gather(1, order)
        start = torch.full((count, 1), tower.start, device=body.device)
        ids = torch.cat([start, body, torch.full((count, 1), tower.pad, device=body.device)], 1)[:, :LENGTH]
        if ids.shape[1] < LENGTH:
            ids = torch.nn.functional.pad(ids, (0, LENGTH - ids.shape[1]), value=tower.pad)
        length = (ids != tower.pad).sum(1, keepdim=True).clamp(max=LENGTH - 1)
        return torch.where(torch.arange(LENGTH, device=ids.device) == length, tower.end, ids)

    def texts(self, slots: torch.Tensor) -> list[str]:
        """The captions as text, for people to read."""
        rows = [" ".join(self.phrases.texts[i] for i in row if i) for row in slots.tolist()]
        return [row.replace(" ,", ",").replace(" .", ".") for row in rows]

    def write(self, scenes: Scenes) -> torch.Tensor:
        """Token ids [B, LENGTH] of one random caption per scene."""
        return self.tokens(self.slots(scenes))


_NUMBERS = ("", "", "two", "three", "four", "five")


def describe(scenes: Scenes, concepts: Sequence[Concept], names: Sequence[str] | None = None) -> list[str]:
    """Plain English for each scene, the wording that evaluation uses; `names` replaces the first concept's name."""
    columns = zip(
        *(getattr(scenes, field).tolist() for field in
          ("concept", "count", "tint", "size", "relation", "style", "ground", "top", "bottom", "styled", "named")),
        strict=True,
    )  # fmt: skip
    prompts = []
    for row, (concept, count, tint, size, relation, style, ground, top, bottom, styled, named) in enumerate(columns):
        groups = [
            _group(concepts[concept[g]], count[g], tint[g], size[g], names[row] if names and g == 0 else None)
            for g in (0, 1)
            if count[g]
        ]
        link = {"left of": "to the left of", "right of": "to the right of"}.get(
            RELATIONS[relation], RELATIONS[relation]
        )
        text = f" {link} ".join(groups)
        if named:
            text += _plain_ground(GROUNDS[ground], COLOUR_NAMES[top], COLOUR_NAMES[bottom])
        prompts.append(f"{text}, {STYLES[style]} style" if styled else text)
    return prompts


def _group(concept: Concept, count: int, tint: int, size: int, name: str | None) -> str:
    noun = concept.plural if count > 1 else name or concept.name
    words = [("", "small", "large")[size], ("", *TINTS)[tint], noun]
    text = " ".join(word for word in words if word)
    if count > 1:
        return f"{_NUMBERS[count]} {text}"
    return f"{article(text)} {text}" if _takes_article(noun, concept) else text


def _plain_ground(ground: str, top: str, bottom: str) -> str:
    match ground:
        case "plain":
            return f" on {article(top)} {top} background"
        case "gradient":
            return f" on {article(top)} {top} to {bottom} gradient"
        case "stripes":
            return f" on {top} and {bottom} stripes"
        case "dots":
            return f" on {article(top)} {top} background with {bottom} dots"
        case _:
            return f" {wordings.GROUND[ground][0][1]}"


def vocabulary(concepts: Sequence[Concept], phrases: Phrases) -> list[str]:
    """Every single word of the phrase table, for a tiny tokenizer."""
    words = " ".join([*phrases.texts, *(w for c in concepts for w in (*c.synonyms, *c.unseen))])
    return sorted(set(re.findall(r"\w+|[^\w\s]", words)))
