"""The model card's figures are the manifest's."""

import json
from pathlib import Path

import pytest

from models.bundles.registry import ROOTS
from models.training import report as module
from models.training.report import report

CARD = Path(__file__).parents[3] / "docs" / "model-card.md"
MANIFEST = ROOTS["default"] / "manifest.json"


def test_the_model_card_shows_the_manifests_figures() -> None:
    training = json.loads(MANIFEST.read_text(encoding="utf-8"))["training"]
    assert f"\n\n{report(training)}\n\n" in CARD.read_text(encoding="utf-8")


def test_the_command_prints_the_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["report", str(MANIFEST)])
    module.main()
    assert capsys.readouterr().out == report(json.loads(MANIFEST.read_text(encoding="utf-8"))["training"]) + "\n"
