"""Verdicts on readings made by hand: four patches in a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.errors import ModelError
from models.scorer.config import Thresholds
from models.scorer.judging import measure, verdicts
from models.scorer.scorer import Reading
from tests.models.scorer.small import SIZES, WORDS, network, record

PATCHES = SIZES.cells**2
NETWORK = network()


def reading(
    *objects: tuple[str, float, str],
    style: str = "3d",
    ground: str = "plain",
    colours: tuple[str, str] = ("red", "red"),
) -> Reading:
    """A picture with (concept, number, tint) on a patch each, and ground elsewhere."""
    concept, cover, density = (
        torch.zeros(1, PATCHES, dtype=torch.long),
        torch.zeros(1, PATCHES),
        torch.zeros(1, PATCHES),
    )
    tint = torch.zeros(1, PATCHES, len(WORDS.tints))
    for patch, (name, number, colour) in enumerate(objects):
        concept[0, patch], cover[0, patch] = WORDS.names.index(name), 1
        density[0, patch], tint[0, patch, WORDS.tints.index(colour)] = number, 1
    words = ((WORDS.styles, style), (WORDS.grounds, ground), (WORDS.colours, colours[0]), (WORDS.colours, colours[1]))
    whole = [torch.tensor([known.index(word)]) for known, word in words]
    patches = torch.randn(1, PATCHES, SIZES.width, generator=torch.Generator().manual_seed(0)).half()
    return Reading(
        torch.zeros(1, SIZES.embed), torch.zeros(1, SIZES.width), concept, cover, density, tint, patches, *whole
    )


def judged(seen: Reading, asked: dict[str, Any], thresholds: Thresholds | None = None) -> dict[str, bool | None]:
    found = verdicts(measure(NETWORK, seen, [asked], WORDS), [asked], WORDS, thresholds or Thresholds())
    return {metric: values[0] for metric, values in found.items()}


APPLE = reading(("apple", 1, "natural"))


def test_what_a_record_does_not_say_is_none() -> None:
    found = judged(APPLE, record(("apple", 1)))
    unsaid = dict.fromkeys(("colours", "relation", "count", "style", "background"))
    assert found == {"objects": True, **unsaid, "all": True}


@pytest.mark.parametrize(
    ("seen", "asked", "right"),
    [
        (APPLE, record(("cat", 1)), False),
        (APPLE, record(("apple", 1), ("cat", 1)), False),
        (reading(("apple", 1, "natural"), ("cat", 1, "natural")), record(("apple", 1), ("cat", 1)), True),
        (reading(("apple", 1, "natural"), ("cat", 1, "natural")), record(("apple", 1)), False),
        (reading(("apple", 1, "natural"), ("cat", 0.3, "natural")), record(("apple", 1)), True),
        (reading(("apple", 0.4, "natural")), record(("apple", 1)), False),
        (reading(), record(("apple", 1)), False),
    ],
)
def test_objects(seen: Reading, asked: dict[str, Any], right: bool) -> None:
    assert judged(seen, asked)["objects"] is right


def test_thresholds_decide_what_is_there() -> None:
    seen = reading(("apple", 0.45, "natural"), ("cat", 0.35, "natural"))
    assert judged(seen, record(("apple", 1)), Thresholds(0.4, 0.4))["objects"] is True
    assert judged(seen, record(("apple", 1)), Thresholds(0.5, 0.4))["objects"] is False
    assert judged(seen, record(("apple", 1)), Thresholds(0.4, 0.3))["objects"] is False


def test_the_prevailing_tint_counts() -> None:
    seen = reading(("apple", 0.4, "blue"), ("apple", 0.3, "blue"), ("apple", 0.3, "red"), ("cat", 1, "red"))
    assert judged(seen, record(("apple", 1, "blue"), ("cat", 1)))["colours"] is True
    assert judged(seen, record(("apple", 1, "blue"), ("cat", 1, "red")))["colours"] is True
    assert judged(seen, record(("apple", 1, "blue"), ("cat", 1, "blue")))["colours"] is False
    assert judged(seen, record(("dog", 1, "blue"), ("cat", 1, "red")))["colours"] is False


def test_a_natural_apple_may_be_called_red() -> None:
    assert judged(APPLE, record(("apple", 1, "red")))["colours"] is True
    assert judged(APPLE, record(("apple", 1, "blue")))["colours"] is False
    assert judged(reading(("cat", 1, "natural")), record(("cat", 1, "red")))["colours"] is False
    assert judged(reading(("apple", 1, "blue")), record(("apple", 1, "red")))["colours"] is False


def test_counts_are_rounded_sums_over_the_patches_of_a_concept() -> None:
    seen = reading(("apple", 1.3, "natural"), ("apple", 1.4, "natural"), ("cat", 1, "natural"))
    assert judged(seen, record(("apple", 3), ("cat", 1)))["count"] is True
    assert judged(seen, record(("apple", 2), ("cat", 1)))["count"] is False
    assert judged(seen, record(("apple", 3), ("cat", 2)))["count"] is False


def test_two_for_one_are_not_all_right() -> None:
    found = judged(reading(("apple", 2, "natural")), record(("apple", 1)))
    assert found["count"] is None
    assert found["all"] is False


def test_backgrounds_are_right_with_their_colours() -> None:
    seen = reading(("apple", 1, "natural"), ground="gradient", colours=("red", "green"))

    def behind(ground: str, *colours: str) -> bool | None:
        background = {"ground": ground, "colours": list(colours)}
        return judged(seen, record(("apple", 1), background=background))["background"]

    assert behind("gradient", "red", "green") is True
    assert behind("gradient", "green", "red") is False
    assert behind("plain", "red") is False
    sea = reading(("apple", 1, "natural"), ground="sea", colours=("white", "green"))
    assert judged(sea, record(("apple", 1), background={"ground": "sea", "colours": []}))["background"] is True


def test_a_relation_needs_both() -> None:
    both = reading(("apple", 1, "natural"), ("cat", 1, "natural"))
    found = [judged(both, record(("apple", 1), ("cat", 1), relation=word))["relation"] for word in WORDS.relations]
    assert found.count(True) == 1
    alone = [judged(APPLE, record(("apple", 1), ("cat", 1), relation=word))["relation"] for word in WORDS.relations]
    assert alone == [False] * len(WORDS.relations)
    assert judged(both, record(("apple", 1), ("cat", 1), relation="and"))["relation"] is None


def test_one_fault_makes_all_wrong() -> None:
    seen = reading(("apple", 1, "natural"), style="flat")
    assert judged(seen, record(("apple", 1), style="flat"))["all"] is True
    found = judged(seen, record(("apple", 1), style="3d"))
    assert (found["style"], found["all"]) == (False, False)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (record(("unicorn", 1)), "concept 'unicorn' is not one that the scorer knows"),
        (record(("apple", 1, "mauve")), "colour 'mauve'"),
        (record(("apple", 1), style="oil"), "style 'oil'"),
        (record(), "names 0 objects"),
    ],
)
def test_words_that_the_scorer_does_not_know(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        judged(APPLE, asked)
