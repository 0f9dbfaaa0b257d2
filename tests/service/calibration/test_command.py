"""The whole calibration, on a tiny bundle with a scorer of random weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from cache.latent.policy import Policy
from models.diffusion.loading import load_model
from service import logs
from service.calibration import calibrate, measuring
from service.calibration.command import run
from service.calibration.drawing import Drawing
from service.cli import main
from service.config import EngineSettings, ModelSettings, Settings
from service.errors import SetupError
from tests.service.evaluation.test_command import home  # noqa: F401


def chosen(out: Path, **changes: object) -> argparse.Namespace:
    defaults = {"prompts": None, "alpha": 0.9, "pairs": 10, "seed": 0, "out": out, "quiet": True}
    return argparse.Namespace(**{**defaults, **changes})


def settings(model: Path) -> Settings:
    return Settings(
        model=ModelSettings(model=str(model), device="cpu", dtype="float32"), engine=EngineSettings(max_batch=4)
    )


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    families = [measuring.Family("solver", "ddim", 3, (1, 2)), measuring.Family("lcm", "lcm", 2, (1,))]
    monkeypatch.setattr(calibrate, "families", lambda card: families)


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process must not change its logging."""
    monkeypatch.setattr(logs, "setup", lambda settings: None)


def test_a_policy_with_its_figures_the_same_each_time(home: Path, tmp_path: Path) -> None:  # noqa: F811
    policy, table = run(chosen(tmp_path / "new" / "policy.json"), settings(home))
    first = (tmp_path / "new" / "policy.json").read_text()
    assert Policy.load(tmp_path / "new" / "policy.json").families == policy.families
    run(chosen(tmp_path / "again.json"), settings(home))
    assert (tmp_path / "again.json").read_text() == first
    figures = json.loads(first)["figures"]
    assert figures["prompts"] == "held-out.jsonl"
    assert sum(bin["pairs"] for bin in figures["families"]["lcm"]["measured"][0]["bins"]) == figures["pairs"] > 0
    assert "| similarity | pairs | from scratch: score, all | K = 1 | K = 2 | allowed | skipped |" in table
    assert policy.target == 0.9


def test_a_late_start_is_the_rest_of_the_same_picture(home: Path) -> None:  # noqa: F811
    model = load_model(str(home), device="cpu", dtype="float32", cache_dir=home)
    drawing = Drawing(model, "ddim", 3, batch=2)
    records = [{"prompt": "a red apple", "seed": seed} for seed in range(3)]
    whole = drawing.run(records, drawing.noise(records), 0, keep=(2,))
    late = drawing.run(records, whole[2], 2)
    assert late[3].equal(whole[3])
    assert drawing.run(records, drawing.noise(records), 0, until=2)[2].equal(whole[2])


def test_the_command_prints_the_table(
    home: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", str(home), "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "policy.json")]
    assert main(["cache", "calibrate", *arguments, "--pairs", "10", "--quiet"]) == 0
    assert capsys.readouterr().out.endswith(f"written to {tmp_path / 'policy.json'}\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"alpha": 0.0}, "--alpha: 0.0 is not allowed"), ({"pairs": 9}, "--pairs: 9 is not allowed; at least 10")],
)
def test_what_cannot_be(home: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:  # noqa: F811
    with pytest.raises(SetupError, match=message):
        run(chosen(tmp_path / "policy.json", **changes), settings(home))


def test_families_are_those_that_start_late_without_a_lora(home: Path) -> None:  # noqa: F811
    card = load_model(str(home), device="cpu", dtype="float32", cache_dir=home).card
    found = {family.name: (family.sampler, family.steps, family.rows) for family in measuring.families(card)}
    assert found["solver"] == ("ddim", 50, (5, 10, 15, 20, 25, 30, 35))
    assert found["lcm"] == ("lcm", 4, (1, 2, 3))
    pairs = 2 * (35 + 50 + 45 + 40 + 35 + 30 + 25 + 20 + 15)
    assert measuring.rows_run(measuring.families(card)[0], 2, 3) == pairs + 3 * (35 + 10 * 50)
