from __future__ import annotations

import random
from typing import Any

import pytest

from service.calibration.edits import EDITS, Editor, reworded, swapped


def record(prompt: str, **fields: Any) -> dict[str, Any]:
    silent: dict[str, Any] = {"objects": None, "relation": None, "style": None, "background": None, "seed": 0}
    return silent | {"prompt": prompt} | fields


def thing(concept: str, colour: str | None = None) -> dict[str, Any]:
    return {"concept": concept, "count": 1, "colour": colour, "size": None}


APPLE = record(
    "a red apple on a blue background, flat style",
    objects=[thing("apple", "red")],
    style="flat",
    background={"ground": "plain", "colours": ["blue"]},
)
OWL = record(
    "an owl on a green to white gradient, 3d style",
    objects=[thing("owl")],
    style="3d",
    background={"ground": "gradient", "colours": ["green", "white"]},
)
CAR = record("a pink car", objects=[thing("car", "pink")])


def test_an_edit_changes_one_word_of_the_prompt_and_of_its_record() -> None:
    editor = Editor([APPLE, OWL, CAR])
    texts = {}
    for field in EDITS:
        edited = editor.edit(APPLE, random.Random(0), field)
        assert edited is not None
        texts[field] = edited["prompt"]
        changed = [name for name in edited if name != "prompt" and edited[name] != APPLE[name]]
        assert changed == [{"colour": "objects", "concept": "objects"}.get(field, field)]
    assert texts["background"] in {f"a red apple on a {colour} background, flat style" for colour in ("green", "white")}
    assert texts["colour"] == "a pink apple on a blue background, flat style"
    assert texts["style"] == "a red apple on a blue background, 3d style"
    assert texts["concept"] in {f"a red {name} on a blue background, flat style" for name in ("owl", "car")}


def test_the_second_colour_of_a_ground_stays() -> None:
    edited = Editor([APPLE, OWL]).edit(OWL, random.Random(0), "background")
    assert edited is not None
    assert edited["background"] in ({"ground": "gradient", "colours": [c, "white"]} for c in ("blue", "white"))


def test_without_a_field_any_that_can_be_changed_is() -> None:
    editor = Editor([APPLE, OWL, CAR])
    found = {editor.edit(CAR, draw)["prompt"] for draw in map(random.Random, range(20))}  # type: ignore[index]
    assert found == {"a red car", "a pink apple", "a pink owl"}


def test_plain_text_has_no_edits_but_other_words() -> None:
    text = record("sunset over the sea")
    assert Editor([APPLE, text]).edit(text, random.Random(0)) is None
    assert reworded(text, random.Random(0))["prompt"].endswith(" of sunset over the sea")


def test_other_words_are_other_and_leave_the_record_as_it_is() -> None:
    for seed in range(30):
        other = reworded(APPLE, random.Random(seed))
        assert other["prompt"] != APPLE["prompt"]
        assert other | {"prompt": ""} == APPLE | {"prompt": ""}
        assert {"red", "apple", "blue", "flat"} <= set(other["prompt"].replace(",", "").split())


@pytest.mark.parametrize(
    ("prompt", "old", "new", "expected"),
    [
        ("a cat on a mint background", "mint", "orange", "a cat on an orange background"),
        ("an owl", "owl", "cat", "a cat"),
        ("two cats", "cat", "dog", "two cats"),
        ("a blue cat on blue", "blue", "red", "a blue cat on blue"),
        ("catalogue of cat", "cat", "dog", "catalogue of dog"),
    ],
)
def test_swapped(prompt: str, old: str, new: str, expected: str) -> None:
    assert swapped(prompt, old, new) == expected
