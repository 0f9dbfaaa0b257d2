"""What fresh noise a family of samplers gets, with a model and a scorer whose pictures are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest

from models.diffusion.model import SamplerDefaults
from service.calibration import calibrate
from service.calibration.calibrate import EDGES, Fitted
from service.calibration.drawing import Drawing, Start
from service.calibration.measuring import Family, Verdicts
from service.calibration.pairs import Pair
from tests.service.calibration.test_edits import record
from tests.service.diffusion.toy import CARD, ToyModel

FAMILY = Family("solver", "ddim", 50, tuple(range(5, 40, 5)))
PER_BIN = 10
SIMILARITIES = (0.92, 1.0)
PAIRS = [Pair(record("a"), record("b"), similarity) for similarity in SIMILARITIES for _ in range(PER_BIN)]


class Seconds:
    """Pictures of prompts of 0.92 are good up to row 12, whatever they start from; those of the same prompt, always."""

    def __init__(self, *ignored: object) -> None: ...

    def verdicts(self, starts: Mapping[int, Start]) -> dict[int, Verdicts]:
        rows = {0: 0} | {k: start.row for k, start in starts.items()}
        return {
            k: {
                "score": [1.0 if row <= 12 or pair.similarity == 1 else 0.5 for pair in PAIRS],
                **{share: [None] * len(PAIRS) for share in ("all", "objects", "background")},
            }
            for k, row in rows.items()
        }


class Answers:
    """Pictures differ by the rows between the latent and where it is entered."""

    scratch = 20.0
    asked: ClassVar[list[Start]] = []

    def __init__(self, *ignored: object) -> None: ...

    def distance(self, start: Start) -> float:
        self.asked.append(start)
        return start.level - start.row


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "Seconds", Seconds)
    monkeypatch.setattr(calibrate, "Answers", Answers)
    monkeypatch.setattr(Answers, "asked", [])


def fitted() -> Fitted:
    model = ToyModel()
    model.card = replace(CARD, samplers=CARD.samplers | {"ddim": SamplerDefaults(50, 5.0, "trailing")})
    scorer = None  # never asked: Seconds and Answers know
    return calibrate._Fitting(model, scorer, Drawing(model, "ddim", 50, 1), FAMILY, PAIRS, [], 0.97).fitted()  # type: ignore[arg-type]


def by_similarity(table: Mapping[str, Sequence[Mapping[str, int]]], name: str) -> list[int]:
    edges = [EDGES.index(0.9), EDGES.index(0.995)]
    return [table["bins"][edge][name] for edge in edges]


def test_the_least_share_that_makes_pictures_differ_half_as_much() -> None:
    found = fitted()
    *others, last = found.figures["diversity"]["shares"]
    assert found.fresh == last["fresh"] > 0
    assert last["ratio"] >= 0.5
    assert all(each["ratio"] < 0.5 for each in others)
    assert [each["fresh"] for each in (*others, last)] == list(calibrate.SHARES[: len(others) + 1])


def test_bins_are_those_measured_with_the_noise_and_tell_what_it_costs() -> None:
    found = fitted()
    without, with_noise = found.figures["measured"]
    assert (without["fresh"], with_noise["fresh"]) == (0, found.fresh)
    assert by_similarity(without, "allowed") == [10, 35]
    assert by_similarity(without, "skipped") == [10, 25]  # what a server keeps
    assert with_noise["starts"][10] == {"level": 20, "row": 10}  # past what is allowed, for the noise
    assert list(with_noise["starts"]) == [5, 10, 15]  # beyond which noise of that share leaves nothing
    assert by_similarity(with_noise, "allowed") == [10, 15]
    assert by_similarity(with_noise, "skipped") == [10, 15]
    assert found.figures["diversity"]["shares"][-1]["start"] == {"level": 25, "row": 15}
    assert [similarity for similarity, _ in found.bins] == [0.9, 0.995]


def test_a_family_whose_pictures_differ_anyway_gets_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answers, "distance", lambda self, start: 10.0)
    found = fitted()
    assert found.fresh == 0
    assert [table["fresh"] for table in found.figures["measured"]] == [0]


def test_noise_that_is_never_enough_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answers, "distance", lambda self, start: 0.0)
    found = fitted()
    assert found.fresh == found.figures["diversity"]["shares"][-1]["fresh"] == calibrate.SHARES[-1]


def test_a_prompt_that_may_not_start_late_needs_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "fit", lambda *arguments: ())
    found = fitted()
    assert (found.fresh, found.figures["diversity"]["shares"], Answers.asked) == (0, [], [])
