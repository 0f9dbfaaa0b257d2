"""Scorer folders: written, loaded, and refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import ModelError
from models.scorer import load_scorer
from tests.models.scorer.small import SIZES, WORDS, network, parts


def test_a_scorer_survives_its_folder(root: Path) -> None:
    scorer = load_scorer(*parts(root), "cpu")
    assert (scorer.sizes, scorer.vocabulary, scorer.thresholds.extra) == (SIZES, WORDS, 0.6)
    expected = network().state_dict()
    for name, value in scorer.network.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


@pytest.fixture
def root(folder: Path, tmp_path: Path) -> Path:
    """A folder to spoil."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _drop(path: Path) -> None:
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if name != "tint.bias"}, path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda at: (at / "scorer" / "config.json").unlink(), "config.json is missing"),
        (lambda at: (at / "scorer" / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda at: (at / "scorer" / "model.safetensors").write_bytes(b"x" * 40), "damaged or cut short"),
        (lambda at: _drop(at / "scorer" / "model.safetensors"), "lacks tint.bias"),
        (lambda at: _edit(at / "scorer" / "config.json", width=32), "has wrong shapes for"),
        (lambda at: _edit(at / "scorer" / "config.json", layers=0), "layers must be a whole number above 0, not 0"),
        (lambda at: _edit(at / "scorer" / "config.json", stem="deep"), "stem must be"),
        (lambda at: _edit(at / "scorer" / "config.json", side=33), "do not divide"),
        (lambda at: _edit(at / "scorer" / "config.json", stem=[4, 8]), r"stem must be multiples of 8, not \[4, 8\]"),
        (
            lambda at: _edit(at / "scorer" / "config.json", thresholds={"present": 1, "extra": -1}),
            "must be numbers above 0, not 1 and -1",
        ),
        (lambda at: _edit(at / "scorer" / "config.json", thresholds={"present": 0.5}), "must be numbers above 0"),
        (lambda at: _edit(at / "scorer" / "concepts.json", tints=[]), "tints must be a list of words"),
        (
            lambda at: _edit(at / "scorer" / "concepts.json", own={"apple": "red"}),
            "own 'apple' must be a list of words",
        ),
        (lambda at: _edit(at / "scorer" / "concepts.json", names=["apple"]), "has wrong shapes for offsets"),
        (lambda at: (at / "text_encoder" / "model.safetensors").unlink(), "holds no weights"),
        (lambda at: (at / "tokenizer" / "vocab.txt").unlink(), "holds no vocabulary"),
    ],
)
def test_a_faulty_folder_is_one_line(root: Path, fault: Any, message: str) -> None:
    arguments = parts(root)
    fault(root)
    with pytest.raises(ModelError, match=message) as caught:
        load_scorer(*arguments, "cpu")
    assert "\n" not in str(caught.value)


def test_another_text_encoder_is_refused(root: Path) -> None:
    scorer, encoder, tokenizer = parts(root)
    weights = load_file(scorer / "model.safetensors")
    weights["projection.weight"] = torch.zeros(SIZES.embed, 48)
    save_file(weights, scorer / "model.safetensors")
    _edit(scorer / "config.json", text_width=48)
    with pytest.raises(ModelError, match=r"trained on text states of width 48; .* gives 32"):
        load_scorer(scorer, encoder, tokenizer, "cpu")
