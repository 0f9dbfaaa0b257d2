"""Drawing and judging with a tiny model and a scorer that looks at colours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.scorer import Statistics
from service.config import EngineSettings, ModelSettings, Settings
from service.diffusion.request import Draft
from service.errors import HeadstartError, InputError
from service.evaluation import evaluate as module
from service.evaluation.drawing import Easel, open_easel
from service.evaluation.evaluate import evaluate
from service.evaluation.prompts import Prompt
from service.evaluation.report import table
from tests import tiny
from tests.service.evaluation.standin import StandIn

TEMPLATE = Draft(prompt="", sampler="ddim", num_inference_steps=2, guidance_scale=3.0)
COUNT = 7


def prompt(line: int, **fields: object) -> Prompt:
    record = {
        "id": f"p{line}",
        "group": "odd" if line % 2 else "even",
        "prompt": ("a red fox", "two cats", "a tiny blue apple")[line % 3],
        "objects": [{"concept": "cat", "count": 1 + line % 2, "colour": None, "size": None}],
        "relation": None,
        "style": "flat",
        "background": None,
        "seed": line,
        "twin": None,
    }
    return Prompt(line, frozenset(record), record | fields)


PROMPTS = [prompt(line) for line in range(COUNT)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tiny.sd(tmp_path_factory.mktemp("tiny"))
    return Settings(model=ModelSettings(model=str(folder), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def easel(settings: Settings) -> Iterator[Easel]:
    with open_easel(settings) as easel:
        yield easel


def test_every_prompt_is_drawn_and_judged_once_in_order(easel: Easel) -> None:
    kept: list[tuple[str, int, tuple[int, ...]]] = []
    found = evaluate(
        easel,
        StandIn(),
        PROMPTS,
        TEMPLATE,
        keep=lambda prompt, request, image: kept.append((request.prompt, image.seed, np.asarray(image.pixels).shape)),
    )
    assert kept == [(each.record["prompt"], each.record["seed"], (64, 64, 3)) for each in PROMPTS]
    assert [row.id for row in found.rows] == [each.record["id"] for each in PROMPTS]
    assert found.settings == {
        "sampler": "ddim",
        "steps": 2,
        "guidance_scale": 3.0,
        "size": "64x64",
        "loras": {},
        "cache": "bypass",
    }
    assert found.evaluations_per_picture == 4  # two steps, each with a negative branch
    assert {name: figures.n for name, figures in found.groups.items()} == {"even": 4, "odd": 3}
    assert found.overall.n == COUNT
    assert found.overall.shares["objects"].n == COUNT
    assert found.overall.shares["count"].n == 3  # of several of a kind
    assert set(found.overall.shares) == {"objects", "count", "style", "all"}
    assert found.wall_s > 0
    assert 0 < found.engine_s < found.wall_s * 1.5
    shares = [row.verdicts["objects"] for row in found.rows]
    assert found.overall.shares["objects"].share == sum(shares) / COUNT
    assert found.overall.score == pytest.approx(sum(row.score for row in found.rows) / COUNT)


def test_figures_do_not_depend_on_the_batch(settings: Settings, easel: Easel) -> None:
    alone = replace(settings, engine=EngineSettings(max_batch=1, max_running=1))
    with open_easel(alone) as one_by_one:
        found = [evaluate(each, StandIn(), PROMPTS, TEMPLATE) for each in (easel, one_by_one)]
    assert [row.verdicts for row in found[0].rows] == [row.verdicts for row in found[1].rows]
    assert [row.score for row in found[0].rows] == pytest.approx([row.score for row in found[1].rows], abs=1e-3)


def test_few_pictures_are_held_at_a_time(easel: Easel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(easel, StandIn(), PROMPTS, TEMPLATE)
    monkeypatch.setattr(module, "HELD_BYTES", 3 * 64 * 64 * 3)
    drawn: list[int] = []
    draw = easel.draw
    monkeypatch.setattr(easel, "draw", lambda requests, *more: drawn.append(len(requests)) or draw(requests, *more))
    parts = evaluate(easel, StandIn(), PROMPTS, TEMPLATE)
    assert drawn == [3, 3, 1]
    assert [row.score for row in parts.rows] == pytest.approx([row.score for row in whole.rows], abs=1e-3)


def test_twins_stand_beside_the_figures(easel: Easel) -> None:
    prompts = [prompt(0, group="synonyms", twin="p2"), prompt(1), prompt(2, group="twins")]
    found = evaluate(easel, StandIn(), prompts, TEMPLATE)
    assert found.overall.n == 2
    assert found.groups["twins"].n == 1
    assert found.twins["synonyms"]["objects"].n == 1
    assert "synonyms: objects" in table("tiny", found, None)


def test_prompts_that_say_nothing_are_only_scored(easel: Easel) -> None:
    scorer = StandIn()
    silent = dict.fromkeys(("group", "objects", "style"))
    found = evaluate(easel, scorer, [prompt(0, **silent)], TEMPLATE)
    assert found.overall.shares == {}
    assert found.groups == {}
    lines = table("tiny", found, None).splitlines()
    assert lines[0] == "tiny: ddim, 2 steps, guidance 3, 64x64"
    assert lines[1].split() == ["group", "n", "score"]
    assert lines[2].split() == ["overall", "1", f"{found.overall.score:.3f}"]
    assert lines[3].startswith("1 pictures, 4 evaluations each, ")


def test_metrics_asked_for_are_those_shown(easel: Easel) -> None:
    found = evaluate(easel, StandIn(), PROMPTS, TEMPLATE, metrics=("style", "count"))
    assert set(found.overall.shares) == {"style", "count"}
    header = table("tiny", found, ("style", "count")).splitlines()[1]
    assert header.split() == ["group", "n", "count", "style"]


def test_a_frechet_distance_of_few_pictures_is_left_out_unless_asked_for(easel: Easel) -> None:
    reference = Statistics.of(torch.rand(50, 3, generator=torch.Generator().manual_seed(0)))
    found = evaluate(easel, StandIn(), PROMPTS, TEMPLATE, reference=reference)
    assert found.frechet is not None
    assert found.frechet > 0
    assert found.notes == []
    few = evaluate(easel, StandIn(), PROMPTS[:2], TEMPLATE, reference=reference)
    assert few.frechet is None
    assert few.notes[0].endswith("2 pictures are fewer than the 3 features, so that it means little; left out")
    asked = evaluate(easel, StandIn(), PROMPTS[:2], TEMPLATE, reference=reference, metrics=("frechet",))
    assert asked.frechet is not None
    assert asked.notes[0].endswith("so that it means little")
    assert evaluate(easel, StandIn(), PROMPTS, TEMPLATE, reference=reference, metrics=("all",)).frechet is None


def test_mistakes_come_before_any_picture(easel: Easel) -> None:
    with pytest.raises(InputError, match="--sampler: 'nope' is not allowed"):
        evaluate(easel, StandIn(), PROMPTS, replace(TEMPLATE, sampler="nope"))
    with pytest.raises(InputError, match=r"^line 8: prompt: 'aaa.* is not allowed; 1 to 2000"):
        evaluate(easel, StandIn(), [*PROMPTS, prompt(8, prompt="a" * 3000)], TEMPLATE)


def test_a_picture_that_fails_ends_the_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.diffusion.loaded import LoadedModel

    with open_easel(settings) as easel:
        monkeypatch.setattr(LoadedModel, "decode", lambda self, latents: 1 / 0)
        with pytest.raises(HeadstartError, match="decoding failed"):
            easel.draw([easel.runtime.resolve(replace(TEMPLATE, prompt="a"), {})])
