"""Pairs say the same on both sides, are the same for the same seed, and keep what is held out apart."""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.rewriter.subjects import Vocabulary
from models.training import wordings
from models.training.captions import describe
from models.training.concepts import STYLES, TINTS, load_concepts
from models.training.prompts import write_records
from models.training.rewriter import noise
from models.training.rewriter.heldout import EACH, held_out, other_wordings, records
from models.training.rewriter.noise import JOIN, Noises, pick
from models.training.rewriter.pairs import CLEAN, FOREIGN, KINDS, SYNONYMS, TYPOS, Pair, PairWriter
from models.training.rewriter.scenes import Meaning, Meanings, Thing, scenes_of
from service.evaluation.prompts import TWINS, read_prompts

CONCEPTS = load_concepts()
VOCABULARY = Vocabulary(CONCEPTS)
LISTS = ("OPENERS", "CLOSERS", "BEFORE", "AFTER", "ADJECTIVES", "WISHES", "FOREIGN")
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}


def fits(caption: str) -> bool:
    return len(caption.split()) <= 20


TRAINED, UNSEEN = PairWriter(CONCEPTS, fits), PairWriter(CONCEPTS, fits, unseen=True)
seeds = st.integers(0, 2**32).map(str)


def words_of(thing: Thing) -> list[str]:
    concept = CONCEPTS[thing.concept]
    return [*concept.words, concept.plural]


@settings(max_examples=25)
@given(seeds)
def test_the_same_seed_writes_the_same(seed: str) -> None:
    assert TRAINED.write(seed, 8) == TRAINED.write(seed, 8)
    assert TRAINED.write(seed, 8) != TRAINED.write(f"{seed}+", 8)


@settings(max_examples=25)
@given(seeds)
def test_captions_say_what_is_meant_and_fit(seed: str) -> None:
    for pair in TRAINED.write(seed, 16):
        assert fits(pair.caption) or pair.kind == FOREIGN
        if pair.meaning is None:
            assert pair.prompt == pair.caption
            continue
        assert describe(scenes_of([pair.meaning]), CONCEPTS) == [pair.caption]
        for thing in pair.meaning.things:
            concept = CONCEPTS[thing.concept]
            assert (concept.plural if thing.count > 1 else concept.name) in pair.caption


@settings(max_examples=40)
@given(seeds, st.sampled_from([kind for kind in KINDS if kind != FOREIGN]), st.booleans())
def test_prompts_keep_their_subjects(seed: str, kind: str, unseen: bool) -> None:
    """Each by one of its words, perhaps misspelt."""
    for pair in (UNSEEN if unseen else TRAINED).write(seed, 4, [kind]):
        assert pair.meaning is not None
        typed = re.findall(r"[^\W_]+", pair.prompt.casefold().replace("'", ""))
        for thing in pair.meaning.things:
            spelt = [re.findall(r"[^\W_]+", word.casefold().replace("'", "")) for word in words_of(thing)]
            assert any(all(any(near(part, word) for word in typed) for part in parts) for parts in spelt), pair


def near(word: str, typed: str) -> bool:
    """As it is, in the plural, or misspelt."""
    return word == typed or (word[0] == typed[0] and SequenceMatcher(None, word, typed).ratio() >= 0.45)


@settings(max_examples=25)
@given(seeds)
def test_counts_and_colours_agree(seed: str) -> None:
    """In prompts without typos and text-speak, which grammar alone writes."""
    for pair in TRAINED.write(seed, 8, ["grammar"]):
        assert pair.meaning is not None
        prompt = pair.prompt.casefold()
        for thing in pair.meaning.things:
            if thing.tint:
                colour = TINTS[thing.tint - 1]
                names = (colour, *wordings.TINT_WORDS.get(colour, ()))
                assert any(name in prompt for name in names), pair
                assert colour in pair.caption
            if thing.count > 1:
                options = (*wordings.COUNTS[thing.count], *wordings.NUMBERS[thing.count])
                assert any(text in prompt for _, text, *_ in options), pair
                assert {word for word in COUNTS if COUNTS[word] == thing.count} & set(pair.caption.split())
        if pair.meaning.style is not None:
            assert any(text in prompt for _, text, *_ in wordings.STYLE_WORDS[STYLES[pair.meaning.style]])


@settings(max_examples=25)
@given(seeds)
def test_two_things_come_in_the_order_of_the_prompt(seed: str) -> None:
    for pair in TRAINED.write(seed, 16, ["grammar"]):
        assert pair.meaning is not None
        found = [each for each in VOCABULARY.find(pair.prompt) if each.sure]
        if len(pair.meaning.things) == 2 and len(found) == 2 and " on " not in pair.caption.split(" background")[0]:
            first = CONCEPTS[pair.meaning.things[0].concept].name
            second = CONCEPTS[pair.meaning.things[1].concept].name
            if first in found[1].concepts and second in found[0].concepts:
                pytest.fail(f"{pair}")


def test_told_the_other_way_round() -> None:
    meaning = Meaning((Thing(0), Thing(1)), relation=1)
    assert meaning.reversed() == Meaning((Thing(1), Thing(0)), relation=2)
    assert Meaning((Thing(0), Thing(1)), relation=7).reversed() is None


def test_all_kinds_in_about_their_shares() -> None:
    counts = Counter(pair.kind for pair in TRAINED.write("shares", 2000))
    assert set(counts) == set(KINDS)
    assert 80 < counts[CLEAN] < 165
    assert 260 < counts[TYPOS] < 380


def test_most_prompts_are_noisy_and_few_are_alike() -> None:
    pairs = TRAINED.write("many", 1000)
    assert sum(pair.prompt == pair.caption for pair in pairs) < 200
    assert len({pair.prompt for pair in pairs}) > 850


@pytest.mark.parametrize("name", LISTS)
def test_noise_names_no_subject(name: str) -> None:
    for phrase in getattr(noise, name):
        assert not [found.key for found in VOCABULARY.find(phrase) if found.sure], phrase


@pytest.mark.parametrize("name", LISTS)
def test_unseen_noise_is_kept_out_of_training(name: str) -> None:
    phrases = getattr(noise, name)
    starred = {phrase[1:] for phrase in phrases if phrase.startswith("*")}
    plain = {phrase for phrase in phrases if not phrase.startswith("*")}
    assert starred
    assert not starred & plain
    assert {pick(Random(i), phrases, unseen=True) for i in range(300)} <= starred
    assert {pick(Random(i), phrases, unseen=False) for i in range(300)} <= plain


def test_unseen_words_of_concepts_are_kept_out_of_training() -> None:
    """A word is long enough here to be no part of another."""
    unseen = {word for concept in CONCEPTS for word in concept.unseen if len(word) > 9}
    prompts = "\n".join(pair.prompt.casefold() for pair in TRAINED.write("synonyms", 1500, [SYNONYMS]))
    trained = {word for concept in CONCEPTS for word in (concept.name, concept.plural, *concept.synonyms)}
    own = {word for word in unseen if not any(word in other for other in trained)}
    assert len(own) > 300
    assert not [word for word in own if word in prompts]


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.booleans())
def test_typos_leave_numbers_short_words_and_the_first_letter(seed: int, unseen: bool) -> None:
    text = f"2 cats 35 on an umbrella{JOIN}stand"
    typed = Noises(Random(seed), ("umbrella",), unseen).typos(text)
    assert typed.startswith("2 c")
    assert " 35 on an u" in typed
    assert typed != text
    assert f"{JOIN}s" in typed


@given(st.integers(0, 2**32))
def test_text_speak_leaves_the_words_of_subjects(seed: int) -> None:
    text = Noises(Random(seed), ()).spoken(f"a blue{JOIN}whale and two-dimensional dots")
    assert f"blue{JOIN}whale" in text
    assert "two-dimensional" in text


def test_held_out_prompts_are_records_that_can_be_evaluated(tmp_path: Path) -> None:
    pairs = held_out(UNSEEN)
    assert pairs == held_out(UNSEEN)
    assert Counter(pair.kind for pair in pairs) == dict.fromkeys(KINDS, EACH)
    path = tmp_path / "heldout.jsonl"
    write_records(path, records(pairs, CONCEPTS))
    prompts = read_prompts(path)
    own = [prompt.record for prompt in prompts if prompt.record["group"] != TWINS]
    twins = {prompt.record["id"]: prompt.record for prompt in prompts if prompt.record["group"] == TWINS}
    assert [record["prompt"] for record in own] == [pair.prompt for pair in pairs]
    for record, pair in zip(own, pairs, strict=True):
        if pair.meaning is None:
            assert record["objects"] is None
            continue
        twin = twins[record["twin"]]
        assert twin["prompt"] == pair.caption
        assert [thing["count"] for thing in record["objects"]] == [thing.count for thing in pair.meaning.things]
        assert all(twin[field] == record[field] for field in ("objects", "relation", "style", "background", "seed"))


def test_other_wordings_mean_the_same() -> None:
    pairs = held_out(UNSEEN)
    again = other_wordings(TRAINED, pairs)
    assert len(again) == len(pairs)
    assert sum(pair.prompt != other.prompt for pair, other in zip(pairs, again, strict=True)) > 150

    def same(pair: Pair, other: Pair) -> bool:
        if pair.meaning is None or other.meaning is None:
            return pair == other
        return other.meaning in (pair.meaning, pair.meaning.reversed())

    assert all(same(pair, other) for pair, other in zip(pairs, again, strict=True))


def test_meanings_draw_only_what_their_style_draws() -> None:
    meanings, rng = Meanings(CONCEPTS), Random(0)
    for meaning in (meanings.draw(rng) for _ in range(2000)):
        style = 0 if meaning.style is None else meaning.style
        assert all(CONCEPTS[thing.concept].drawings[style] for thing in meaning.things)
        assert sum(thing.count for thing in meaning.things) <= 5
        assert len({thing.concept for thing in meaning.things}) == len(meaning.things)
        assert all(not thing.tint or CONCEPTS[thing.concept].tintable for thing in meaning.things)


def test_captions_that_cannot_fit_are_told() -> None:
    with pytest.raises(ValueError, match="fits the image model"):
        PairWriter(CONCEPTS[:3], lambda caption: False).write("0", 2)
