"""The text of a choice does not depend on where its tokens break."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.llm.text import ChoiceText


class Bytes:
    """A detokeniser whose tokens are bytes of UTF-8; half a character waits."""

    def __init__(self) -> None:
        self._waiting = b""

    def add(self, tokens: Sequence[int]) -> str:
        self._waiting += bytes(tokens)
        try:
            text = self._waiting.decode()
        except UnicodeDecodeError:
            return ""
        self._waiting = b""
        return text

    def finish(self) -> str:
        return self._waiting.decode(errors="replace")


class Words:
    """A detokeniser whose token i is the i-th of some strings."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def add(self, tokens: Sequence[int]) -> str:
        return "".join(self._words[token] for token in tokens)

    def finish(self) -> str:
        return ""


def written(text: ChoiceText, tokens: list[int]) -> list[str]:
    """What each token gives out, and the end; as an engine does, nothing is added after a stop."""
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            return pieces
    return [*pieces, text.finish()]


def expected(text: str, stop: list[str]) -> tuple[str, bool]:
    """By adding a character at a time and looking for a stop string at the end."""
    for end in range(len(text) + 1):
        ended = [len(word) for word in stop if text[:end].endswith(word)]
        if ended:
            return text[: end - max(ended)], True
    return text, False


TEXTS = st.text(alphabet="abé", max_size=12)


@given(TEXTS, st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3), st.data())
@example("xaab", ["ab"], None)
def test_stop_strings_are_cut_out_wherever_tokens_break(text: str, stop: list[str], data: st.DataObject | None) -> None:
    cuts = [] if data is None else data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    edges = sorted({0, len(text), *cuts})
    words = [text[low:high] for low, high in itertools.pairwise(edges)]
    choice = ChoiceText(Words(words), stop)
    assert ("".join(written(choice, list(range(len(words))))), choice.stopped) == expected(text, stop)


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_bytes_of_characters_arrive_whole(text: str, stop: list[str]) -> None:
    choice = ChoiceText(Bytes(), stop)
    pieces = written(choice, list(text.encode()))
    assert "".join(pieces) == expected(text, stop)[0]


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    choice = ChoiceText(Words(["Hel", "lo\n", "wo", "\n", "\n", "more"]), ["\n\n"])
    assert [choice.add(token) for token in range(5)] == ["Hel", "lo", "\nwo", "", ""]
    assert choice.stopped
    assert choice.add(5) == choice.finish() == ""


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    choice = ChoiceText(Bytes(), [])
    assert written(choice, list("aé".encode())[:2]) == ["a", "", "\ufffd"]


def test_of_two_stop_strings_the_one_complete_first_counts() -> None:
    assert written(ChoiceText(Words(["xabcd"]), ["abcd", "bc"]), [0]) == ["xa"]


@pytest.mark.parametrize("held", ["a", "aa"])
def test_what_was_held_back_comes_at_the_end(held: str) -> None:
    assert written(ChoiceText(Words(["x" + held]), ["aaa"]), [0]) == ["x", held]
