"""Figures from verdicts, by hand."""

from __future__ import annotations

import pytest

from service.evaluation.figures import Figures, Judged, Share, TwinFigures, figures_of, groups_of, twins_of


def judged(name: str, group: str | None, score: float, twin: str | None = None, **verdicts: bool) -> Judged:
    return Judged(1, name, group, twin, "a cat", 0, 4, score, verdicts)


ROWS = [
    judged("a", "single", 0.5, objects=True),
    judged("b", "single", 0.7, objects=False, relation=True),
    judged("c", "synonyms", 0.9, "d", objects=True, all=True),
    judged("d", "twins", 0.1, "c", objects=True, all=True),
    judged("e", "synonyms", 0.3, "f", objects=False, all=False),
    judged("f", "twins", 0.1, objects=True),
    judged("g", "synonyms", 0.3, "not drawn", objects=True),
]


def test_shares_are_of_the_records_that_say_something() -> None:
    found = figures_of(ROWS[:2], ("objects", "relation", "style", "score"))
    assert found == Figures(2, pytest.approx(0.6), {"objects": Share(0.5, 2), "relation": Share(1.0, 1)})


def test_groups_come_in_order_and_ungrouped_prompts_in_none() -> None:
    assert list(groups_of([judged("x", None, 0.0), *ROWS], ("objects",))) == ["single", "synonyms", "twins"]


def test_other_wordings_are_compared_with_the_twins_that_were_drawn() -> None:
    found = twins_of(ROWS, ("objects", "all"))
    assert found == {"synonyms": {"objects": TwinFigures(0.5, 1.0, 2), "all": TwinFigures(1.0, 1.0, 1)}}
    assert found["synonyms"]["objects"].ratio == 0.5
    assert TwinFigures(0.0, 0.0, 3).ratio is None
