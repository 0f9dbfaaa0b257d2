"""Captions as people might word them, assembled on the device as token ids from a table of phrases.

A caption is a row of slots, each holding one phrase (0 is the empty phrase). Slots are filled by weighted choice,
put in one of a few orders, and their tokens are packed between [CLS] and [SEP].
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch

from models.training import wordings
from models.training.concepts import COLOUR_NAMES, COLOUR_WORDS, STYLES, Concept, article, pluralise
from models.training.phrases import Phrases, Variants, Wordings, Words
from models.training.scenes import PAIR, SMALL, THREE, TWO, Scenes
from models.training.text import LENGTH, TextTower
from models.training.wordings import Weighted, Wording


class Slot(IntEnum):
    """The slots in their usual order."""

    PREFIX = 0
    COUNT = 1
    SIZE = 2
    FILLER = 3
    STYLE = 4
    COLOUR = 5
    NOUN = 6
    SUFFIX = 7
    RELATION = 8
    COUNT2 = 9
    STYLE2 = 10
    COLOUR2 = 11
    NOUN2 = 12
    MANNER = 13
    ON = 14
    TOP = 15
    TO = 16
    BOTTOM = 17
    GROUND = 18
    AFTER = 19
    STOP = 20


_BACKGROUND = (Slot.ON, Slot.TOP, Slot.TO, Slot.BOTTOM, Slot.GROUND)
_USUAL = tuple(Slot)
_BACKGROUND_FIRST = (*_BACKGROUND, *(slot for slot in Slot if slot not in _BACKGROUND))


def _plural_synonym(word: str) -> str:
    """Plural of a synonym; those already plural, or of the form 'x of y', stay as they are."""
    return word if word.endswith("s") or " of " in word else pluralise(word)


class CaptionWriter:
    """Writes one random caption per scene."""

    def __init__(self, concepts: Sequence[Concept], tower: TextTower) -> None:
        device = tower.device
        self.phrases = phrases = Phrases()
        self._tower = tower

        def words(options: Weighted) -> Words:
            return Words(options, phrases, device)

        def grounds(options: Sequence[Wording]) -> Wordings:
            return Wordings(options, phrases, device)

        def styled(options: Mapping[str, Weighted]) -> list[Words]:
            return [words(options[style]) for style in STYLES]

        self._prefix, self._filler = words(wordings.PREFIX), words(wordings.FILLER)
        self._suffix, self._stop = words(wordings.SUFFIX), words(wordings.STOP)
        self._small, self._large = words(wordings.SMALL), words(wordings.LARGE)
        self._two, self._three = words(wordings.TWO), words(wordings.THREE)
        self._left, self._right = words(wordings.LEFT), words(wordings.RIGHT)
        self._by_style = {
            Slot.PREFIX: styled(wordings.STYLED_PREFIX),
            Slot.MANNER: styled(wordings.MANNER),
            Slot.AFTER: styled(wordings.AFTER),
        }
        self._plain, self._gradient = grounds(wordings.PLAIN), grounds(wordings.GRADIENT)
        self._front_plain, self._front_gradient = grounds(wordings.FRONT_PLAIN), grounds(wordings.FRONT_GRADIENT)
        self._singular = Variants([[phrases.add(w) for w in (c.name, *c.synonyms)] for c in concepts], device)
        self._plural = Variants(
            [[phrases.add(w) for w in (c.plural, *map(_plural_synonym, c.synonyms))] for c in concepts], device
        )
        self._adjectives = Variants([[phrases.add(w) for w in c.colours] for c in concepts], device)
        self._colours = Variants(
            [[phrases.add(w) for w in (name, *COLOUR_WORDS.get(name, ()))] for name in COLOUR_NAMES], device
        )
        self._takes_article = torch.tensor([c.plural != c.name for c in concepts], device=device)
        self._styles = torch.tensor([phrases.add(style) for style in STYLES], device=device)
        self._a, self._an, self._the, self._one = (phrases.add(text) for text in ("a", "an", "the", "one"))
        self._orders = torch.tensor([_USUAL, _BACKGROUND_FIRST], device=device)
        self._finish(phrases, tower, device)

    def _finish(self, phrases: Phrases, tower: TextTower, device: torch.device) -> None:
        """Tokenise the finished phrase table."""
        pieces = [tower.pieces(text) for text in phrases.texts]
        width = max(len(row) for row in pieces)
        table = [[*row, *([tower.pad] * (width - len(row)))] for row in pieces]
        self._pieces = torch.tensor(table, device=device)
        self._vowel = torch.tensor([article(text) == "an" for text in phrases.texts], device=device)

    def _variant(self, table: Variants, index: torch.Tensor, plain: float) -> torch.Tensor:
        """The canonical variant with probability `plain`, else any."""
        usual = torch.rand(len(index), device=index.device) < plain
        return torch.where(usual, 0, table.draw(index))

    def _article(self, following: Sequence[torch.Tensor], allowed: torch.Tensor) -> torch.Tensor:
        """'a' or 'an' by the first word that follows, sometimes 'the', 'one' or nothing."""
        head = following[-1]
        for phrase in reversed(following[:-1]):
            head = torch.where(phrase > 0, phrase, head)
        usual = torch.where(self._vowel[head], self._an, self._a)
        u = torch.rand(len(head), device=head.device)
        word = torch.where(u < 0.58, usual, torch.where(u < 0.61, self._the, torch.where(u < 0.64, self._one, 0)))
        return torch.where(allowed, word, 0)

    def _adjective(self, index: torch.Tensor) -> torch.Tensor:
        """One of the concept's own colours, now and then."""
        said = torch.rand(len(index), device=index.device) < 0.25
        return torch.where(said, self._adjectives.take(index, self._adjectives.draw(index)), 0)

    def slots(self, scenes: Scenes) -> torch.Tensor:
        """Phrase ids [B, slots], in reading order."""
        count, device = len(scenes), scenes.kind.device
        empty = torch.zeros(count, dtype=torch.long, device=device)
        out: dict[Slot, torch.Tensor] = dict.fromkeys(Slot, empty)
        self._write_style(scenes, out)
        self._write_subject(scenes, out)
        front = self._write_background(scenes, out)
        out[Slot.STOP] = self._stop.draw(count)
        rows = torch.stack([out[slot] for slot in Slot], 1)
        return rows.gather(1, self._orders[front.long()])

    def _write_style(self, scenes: Scenes, out: dict[Slot, torch.Tensor]) -> None:
        """Say the style as an adjective, in the prefix, after the subject or after the background."""
        count = len(scenes)
        place = torch.rand(count, device=scenes.kind.device)
        out[Slot.PREFIX] = self._prefix.draw(count)
        bounds = {Slot.PREFIX: (0.6, 0.78), Slot.MANNER: (0.78, 0.88), Slot.AFTER: (0.88, 1.01)}
        for slot, (low, high) in bounds.items():
            here = scenes.styled & (place >= low) & (place < high)
            said = torch.where(
                scenes.style == 0, self._by_style[slot][0].draw(count), self._by_style[slot][1].draw(count)
            )
            out[slot] = torch.where(here, said, out[slot])
        said = torch.where(scenes.styled & (place < 0.6), self._styles[scenes.style], 0)
        out[Slot.STYLE] = said
        again = (scenes.kind == PAIR) & (torch.rand(count, device=place.device) < 0.4)
        out[Slot.STYLE2] = torch.where(again, said, 0)

    def _write_subject(self, scenes: Scenes, out: dict[Slot, torch.Tensor]) -> None:
        count, kind = len(scenes), scenes.kind
        pair, two, three = kind == PAIR, kind == TWO, kind == THREE
        many = two | three
        backwards = pair & (torch.rand(count, device=kind.device) < 0.25)
        first = torch.where(backwards, scenes.second, scenes.first)
        second = torch.where(backwards, scenes.first, scenes.second)
        out[Slot.RELATION] = torch.where(
            pair, torch.where(backwards, self._right.draw(count), self._left.draw(count)), 0
        )
        size = torch.where(kind == SMALL, self._small.draw(count), 0)
        out[Slot.SIZE] = torch.where(scenes.large, self._large.draw(count), size)
        out[Slot.FILLER] = self._filler.draw(count)
        out[Slot.COLOUR] = self._adjective(first)
        out[Slot.COLOUR2] = torch.where(pair, self._adjective(second), 0)
        variant = self._variant(self._singular, first, 0.7)
        out[Slot.NOUN] = torch.where(many, self._plural.take(first, variant), self._singular.take(first, variant))
        variant = self._variant(self._singular, second, 0.7)
        out[Slot.NOUN2] = torch.where(pair, self._singular.take(second, variant), 0)
        out[Slot.SUFFIX] = torch.where(kind <= SMALL, self._suffix.draw(count), 0)
        before = [out[slot] for slot in (Slot.SIZE, Slot.FILLER, Slot.STYLE, Slot.COLOUR, Slot.NOUN)]
        one = self._article(before, self._takes_article[first] & ~many)
        some = torch.where(two, self._two.draw(count), self._three.draw(count))
        out[Slot.COUNT] = torch.where(many, some, one)
        before = [out[slot] for slot in (Slot.STYLE2, Slot.COLOUR2, Slot.NOUN2)]
        out[Slot.COUNT2] = self._article(before, self._takes_article[second] & pair)

    def _write_background(self, scenes: Scenes, out: dict[Slot, torch.Tensor]) -> torch.Tensor:
        """Fill the background's slots; returns bool [B]: the background comes first."""
        count = len(scenes)
        front = scenes.named & (torch.rand(count, device=scenes.kind.device) < 0.05)
        top = self._colours.take(scenes.top, self._variant(self._colours, scenes.top, 0.75))
        bottom = self._colours.take(scenes.bottom, self._variant(self._colours, scenes.bottom, 0.75))
        vowel = self._vowel[top]
        forms = (self._plain, self._gradient, self._front_plain, self._front_gradient)
        drawn = [torch.stack(form.draw(vowel)) for form in forms]
        usual = torch.where(scenes.gradient, drawn[1], drawn[0])
        chosen = torch.where(front, torch.where(scenes.gradient, drawn[3], drawn[2]), usual)
        chosen = torch.where(scenes.named, chosen, 0)
        out[Slot.ON], out[Slot.TO], out[Slot.GROUND] = chosen[0], chosen[1], chosen[2]
        out[Slot.TOP] = torch.where(scenes.named, top, 0)
        out[Slot.BOTTOM] = torch.where(scenes.named & scenes.gradient, bottom, 0)
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


def vocabulary(concepts: Sequence[Concept], phrases: Phrases) -> list[str]:
    """Every single word of the phrase table, for a tiny tokenizer."""
    words = " ".join([*phrases.texts, *(w for c in concepts for w in (*c.synonyms, *c.unseen))])
    return sorted(set(words.replace("-", " - ").replace(",", " , ").replace(".", " . ").replace("'", " ' ").split()))
