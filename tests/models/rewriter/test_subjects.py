"""Subjects are found by any of their words, in plurals and with typos, and not where others only look like them."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.rewriter.subjects import Vocabulary, one_typo, singular
from models.training.concepts import load_concepts, pluralise
from models.training.rewriter.noise import Noises

CONCEPTS = load_concepts()
WORDS = {"house", "bouncing", "hat", "dots", "four", "blue", "smal"}
PLAIN = Vocabulary(CONCEPTS)
MENDING = Vocabulary(CONCEPTS, WORDS.__contains__)


def sure(vocabulary: Vocabulary, text: str) -> list[frozenset[str]]:
    return [found.concepts for found in vocabulary.find(text) if found.sure]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("two kitties and a DOG", [{"cat"}, {"dog"}]),
        ("a hot dog, not a dog", [{"hot dog"}, {"dog"}]),
        ("a cat under the stars", [{"cat"}]),
        ("i would like a fork and knife", [{"fork and knife"}]),
        ("a bike on the beach", [{"bicycle"}]),
        ("an orange car", [{"car"}]),
        ("women in headscarves", [{"woman in a headscarf"}]),
        ("the theory of relativity", []),
        ("", []),
    ],
)
def test_subjects_in_order(text: str, names: list[set[str]]) -> None:
    assert sure(PLAIN, text) == names


@pytest.mark.parametrize("text", ["appel", "aple", "applle", "spple", "an apqle", "apples"])
def test_one_typo_is_undone(text: str) -> None:
    assert sure(MENDING, text) == [{"apple"}]


def test_words_of_the_language_are_no_typos() -> None:
    assert sure(MENDING, "house") == [{"house"}]  # and not the horse, which is one letter away
    assert sure(Vocabulary(CONCEPTS, lambda word: True), "appel") == []
    assert sure(PLAIN, "appel") == []


def test_every_concept_is_found_by_all_its_words() -> None:
    for concept in CONCEPTS:
        for word in (*concept.words, concept.plural, pluralise(concept.name)):
            assert concept.name in PLAIN.names(f"{word} on a red background"), word


def test_understands_only_what_it_knows() -> None:
    assert PLAIN.understands("two red apples on a wooden table")
    assert not PLAIN.understands("two red apples on a turntable")


letters = st.text("abcdef", min_size=1, max_size=6)


@given(letters, letters)
def test_one_typo_is_one_edit(first: str, second: str) -> None:
    edits = {first[:i] + first[i + 1 :] for i in range(len(first))}
    edits |= {first[:i] + c + first[i:] for i in range(len(first) + 1) for c in "abcdef"}
    edits |= {first[:i] + c + first[i + 1 :] for i in range(len(first)) for c in "abcdef"}
    edits |= {first[:i] + first[i + 1] + first[i] + first[i + 2 :] for i in range(len(first) - 1)}
    assert one_typo(first, second) == (second in edits - {first})


@pytest.mark.parametrize(
    ("plural", "noun"),
    [("foxes", "fox"), ("cherries", "cherry"), ("glasses", "glass"), ("churches", "church"), ("horses", "horse"),
     ("men", "man"), ("leaves", "leaf"), ("cats", "cat"), ("bus", "bus"), ("ties", "tie")],
)  # fmt: skip
def test_a_plural_comes_out_as_its_singular(plural: str, noun: str) -> None:
    assert singular(plural) == singular(noun) == noun


@given(st.integers(0, 10_000))
def test_typing_errors_of_the_recipe_are_undone(seed: int) -> None:
    """Those by finger are one typo each; a word with two neighbours stays as it is."""
    typo = Noises(Random(seed), ()).typos("umbrella")
    assert sure(MENDING, typo) == [{"umbrella"}]
