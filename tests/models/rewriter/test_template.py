"""All conversations begin alike, and a prompt cannot end its own turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.rewriter.template import MAX_LENGTH, caption_of, messages, one_line


@given(st.text())
def test_all_but_the_last_message_are_shared(prompt: str) -> None:
    *shared, last = messages(prompt)
    assert shared == messages("another")[:-1]
    assert last["role"] == "user"
    assert "<|" not in last["content"]
    assert "\n" not in last["content"]


def test_a_prompt_is_otherwise_left_alone() -> None:
    assert one_line("  a Cat,\n on\ta  hat! ") == "a Cat, on a hat!"


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("a red apple", "a red apple"),
        ("\n\n a red  apple.\nAnd more", "a red apple"),
        ('"a red apple"', "a red apple"),
        ("'a red apple'.", "a red apple"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_the_caption_is_one_line_of_words(answer: str, caption: str) -> None:
    assert caption_of(answer) == caption


@given(st.text())
def test_captions_are_bounded(answer: str) -> None:
    caption = caption_of(answer)
    assert len(caption) <= MAX_LENGTH
    assert caption == " ".join(caption.split())
