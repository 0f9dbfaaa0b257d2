"""The model card's figures are the manifest's; what is no training's figures is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.bundles.registry import ROOTS
from models.training import report as module
from models.training.report import report

CARD = Path(__file__).parents[3] / "docs" / "model-card.md"
MANIFEST = ROOTS["default"] / "manifest.json"

STAGE = {
    "steps": 1200, "pictures": 153600, "pictures_per_second": 650.4, "first_loss": 0.8474, "last_loss": 0.02539,
    "parameters_m": 5.849255,
}  # fmt: skip
VALIDATION = {
    "renders": {"single": {"objects": 0.9961, "score": 0.542}, "pair": {"relation": 1.0}},
    "told wrongly": {
        "wrong object": {"true": 0.9961, "wrong": 0.0, "true score": 0.5, "wrong score": 0.3, "preferred": 0.988},
        "wrong style": {},
    },
    "pictures": {"renders": {"objects": 0.98, "frechet": 1.5551}},
}
CEILINGS = {
    "real renders": {
        "groups": {"single": {"objects": {"share": 0.995, "n": 200}, "style": {"share": 0.5, "n": 18}}},
        "frechet": 0.17818,
    }
}


def training() -> dict[str, Any]:
    return {
        "scorer": {**STAGE, "validation": VALIDATION},
        "teacher": {**STAGE, "float16_weights_error": 0.000512},
        "consistency": {**STAGE, "sigmas": {"1": [80.0], "2": [80.0, 0.6789]}},
    }


def test_the_model_card_shows_the_manifests_figures() -> None:
    figures = json.loads(MANIFEST.read_text(encoding="utf-8"))["training"]
    assert f"\n\n{report(figures)}\n\n" in CARD.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [
        "| teacher | 5.85 M | 1,200 | 153,600 | 650 | 0.8474 → 0.02539 |",
        "| single | 99.6 | 0.542 |  |",
        "| pair |  |  | 100.0 |",
        "| wrong object | 99.6 | 0.0 | 98.8 |",
        "| renders | 98.0 | 1.555 |",
        "| consistency LoRA | 2 | 80, 0.6789 |",
        "| teacher | 5.1e-04 |  |",
        "| single | 200 | 99.5 | 50.0 (18) |",
        "Fréchet distance of real renders: 0.178.",
    ],
)
def test_every_figure_has_its_line(line: str) -> None:
    assert line in report(training(), CEILINGS).splitlines()


def test_what_is_not_there_is_left_out() -> None:
    tables = report({"teacher": STAGE})
    assert tables.count("\n\n") == 0
    assert "| VAE |" not in tables
    assert "wrong style" not in report(training())


@pytest.mark.parametrize("value", [{}, {"concepts": 417}, {"vae": 3}])
def test_what_is_no_training_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="these are no figures of a training: none of vae, scorer"):
        report(value)


def test_the_command_prints_the_report_of_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"training": training()}))
    monkeypatch.setattr("sys.argv", ["report", str(manifest)])
    module.main()
    assert capsys.readouterr().out == report(training()) + "\n"
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "reference.json").write_text(json.dumps(CEILINGS))
    module.main()
    assert capsys.readouterr().out == report(training(), CEILINGS) + "\n"


def test_the_command_names_a_file_without_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    monkeypatch.setattr("sys.argv", ["report", str(manifest)])
    with pytest.raises(SystemExit):
        module.main()
    assert f"{manifest}: these are no figures of a training" in capsys.readouterr().err
