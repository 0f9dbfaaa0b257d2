"""`headstart eval` on a tiny bundle with a scorer of random weights: what it writes and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.scorer import Statistics
from models.scorer.config import Sizes, Thresholds, Vocabulary
from models.scorer.loading import save_scorer
from models.scorer.network import ScorerNetwork
from service import logs
from service.cli import main
from service.evaluation import material
from service.pictures import read_recipe
from tests import tiny

SIZES = Sizes(side=32, stem=(8, 16), width=16, layers=1, heads=2, embed=8, text_width=32)
VOCABULARY = Vocabulary(
    ("apple", "cat", "dog", "fox"), ("natural", "red", "blue"), ("3d", "flat"), ("plain",), ("white",), ("left of",)
)
RECORDS = [
    {"id": "a", "group": "single", "prompt": "a red apple", "objects": [{"concept": "apple", "colour": "red"}]},
    {"id": "b", "group": "single", "prompt": "a flat cat", "objects": [{"concept": "cat"}], "style": "flat"},
    {"id": "c", "group": "counts", "prompt": "two foxes", "objects": [{"concept": "fox", "count": 2}], "seed": 7},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.bundle_with_loras(tmp_path_factory.mktemp("model") / "tiny-bundle")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ScorerNetwork(SIZES, VOCABULARY)
    save_scorer(folder / "scorer", network.state_dict(), SIZES, VOCABULARY, Thresholds())
    (folder / "eval").mkdir()
    (folder / "eval" / "held-out.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    features = torch.randn(40, SIZES.width, generator=torch.Generator().manual_seed(0))
    Statistics.of(features).save(folder / "eval" / "reference.safetensors")
    return folder


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "setup", lambda settings: None)
    for variable in [name for name in os.environ if name.startswith("HEADSTART_")]:
        monkeypatch.delenv(variable)


def evaluated(model: Path, *arguments: str) -> int:
    return main(["eval", "--model", str(model), "--device", "cpu", "--dtype", "float32", "--steps", "2", *arguments])


def told(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("loading ", "the scorer is"))]
    assert out == ""
    assert len(lines) == 1
    return lines[0].removeprefix("headstart: ")


def test_figures_files_and_table(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert evaluated(home, "--out", str(out), "--pictures", "--sheet", "--seed", "40") == 0
    printed, err = capsys.readouterr()
    assert "the scorer is that of tiny-bundle" in err
    title, header, *groups = printed.splitlines()
    assert title == "tiny-bundle: lcm, 2 steps, guidance 2, 64x64"
    assert header.split() == ["group", "n", "score", "objects", "colours", "count", "style", "all"]
    assert [line.split()[:2] for line in groups[:3]] == [["single", "2"], ["counts", "1"], ["overall", "3"]]
    assert groups[-1].startswith("Frechet distance: 3 pictures are fewer than the 16 features")

    results = json.loads((out / "results.json").read_text())
    assert results["model"] == {"name": "tiny-bundle", "revision": "local", "source": str(home)}
    assert results["prompts"] == {"file": str(home / "eval" / "held-out.jsonl"), "limit": None, "seed": 40}
    assert results["engine"] == {"dtype": "float32", "device": "cpu", "max_batch": 16, "max_running": 32}
    assert results["settings"]["steps"] == 2
    assert results["pictures"] == 3
    assert results["evaluations_per_picture"] == 2
    assert results["pictures_per_second"] == pytest.approx(1 / results["seconds_per_picture"])
    assert results["engine_seconds_per_picture"] > 0
    assert results["frechet"] is None
    assert {metric: results["overall"][metric]["n"] for metric in ("objects", "colours", "count", "style")} == {
        "objects": 3,
        "colours": 1,
        "count": 1,
        "style": 1,
    }

    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [(row["id"], row["seed"], row["line"]) for row in rows] == [("a", 41, 1), ("b", 42, 2), ("c", 7, 3)]
    shares = [row["verdicts"]["objects"] for row in rows]
    assert results["overall"]["objects"]["share"] == sum(shares) / 3

    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["a.png", "b.png", "c.png"]
    recipe = read_recipe(out / "pictures" / "c.png")
    assert (recipe.prompt, recipe.parameters["Seed"]) == ("two foxes", "7")
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size[0] > 2 * 64


def test_the_same_command_gives_the_same_figures(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for number, batch in enumerate(("16", "1", "16")):
        folder = tmp_path / ("first" if number != 1 else "alone")  # the third run writes over the first
        assert evaluated(home, "--out", str(folder), "--max-batch", batch, "--json", "--quiet") == 0
        assert json.loads(capsys.readouterr().out) == json.loads((folder / "results.json").read_text())
        rows.append([json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()])
    assert rows[0] == rows[2]
    assert [row["verdicts"] for row in rows[1]] == [row["verdicts"] for row in rows[0]]
    assert [row["score"] for row in rows[1]] == pytest.approx([row["score"] for row in rows[0]], abs=1e-3)


def test_results_of_an_earlier_run_do_not_outlive_it(home: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    assert evaluated(home, "--out", str(tmp_path), "--sampler", "nope", "--quiet") == 2
    assert not (tmp_path / "results.json").exists()


def test_a_model_without_a_scorer_is_judged_by_the_default_models(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "bundle_path", lambda name, cache_dir: home)
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a red fox\ntwo cats\na dog\n")
    stranger = tiny.sd(tmp_path / "stranger")
    out = tmp_path / "out"
    assert evaluated(stranger, "--prompts", str(prompts), "--limit", "2", "--out", str(out), "--sampler", "ddim") == 0
    assert "the scorer is that of tiny-bundle" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert results["model"]["name"] == "stranger"
    assert results["scorer"] == str(home / "scorer")
    assert results["overall"].keys() == {"n", "score"}
    assert results["pictures"] == 2


def test_a_lora_that_comes_with_the_model_is_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(home, "--lora", "lcm-lora:0.5", "--limit", "1", "--out", str(tmp_path)) == 0
    assert ": lcm, 2 steps, guidance 2.5, LoRA lcm-lora at 0.5, 64x64" in capsys.readouterr().out
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["loras"] == {"lcm-lora": 0.5}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--limit", "0"], "--limit: 0 is not allowed; at least 1"),
        (["--seed", "-1"], "--seed: -1 is not allowed; 0 to 4294967295"),
        (["--size", "big"], "--size: 'big' is not allowed; WIDTHxHEIGHT"),
        (["--metrics", "colour"], "--metrics: 'colour' is not allowed; score, objects, colours"),
        (["--metrics", "relation"], "held-out.jsonl lacks: line 1"),
        (["--prompts", "/missing.txt"], "/missing.txt: cannot be read: No such file or directory"),
        (["--prompts", "/dev/null"], "/dev/null: has no prompts"),
        (["--out", "/dev/null"], "--out: /dev/null: cannot be written: File exists"),
        (["--sampler", "nope"], "--sampler: 'nope' is not allowed; this model has"),
        (["--steps", "0"], "--steps: 0 is not allowed"),
        (["--lora", "unheard-of"], "--lora: 'unheard-of' is not allowed"),
    ],
)
def test_mistakes_are_told_in_one_line(
    home: Path, tmp_path: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(home, "--out", str(tmp_path), *arguments) == 2
    assert line in told(capsys)


def test_names_that_the_scorer_does_not_know(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a cat"}\n{"prompt": "a dig", "objects": [{"concept": "dig"}]}\n')
    assert evaluated(home, "--out", str(tmp_path), "--prompts", str(prompts)) == 2
    assert told(capsys) == f"{prompts}: line 2: concept: 'dig' is not known; did you mean dog?"


def test_models_that_take_no_prompts(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "bundle_path", lambda name, cache_dir: home)
    model = tiny.consistency(tmp_path / "tiny", num_classes=3)
    assert evaluated(model, "--out", str(tmp_path)) == 2
    assert told(capsys).startswith("--model: tiny takes no prompts")


def test_statistics_of_another_scorer(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(home, tmp_path / "other"))
    Statistics.of(torch.rand(5, SIZES.width + 1)).save(other / "eval" / "reference.safetensors")
    assert evaluated(other, "--out", str(tmp_path / "out"), "--metrics", "frechet") == 2
    assert told(capsys).endswith("reference.safetensors is of 17 features, the scorer beside it has 16")


@pytest.mark.parametrize(
    ("source", "target", "line"),
    [
        ("unet_lcm", "unet", "this is an LCM student where the teacher is expected"),
        ("unet", "unet_lcm", "this is a teacher where an LCM student is expected"),
    ],
)
def test_teacher_and_student_in_each_others_place(
    home: Path, tmp_path: Path, source: str, target: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Path(shutil.copytree(home, tmp_path / "wrong"))
    shutil.rmtree(wrong / target)
    shutil.copytree(wrong / source, wrong / target)
    assert evaluated(wrong, "--out", str(tmp_path / "out")) == 2
    assert line in told(capsys)


def test_a_process_of_its_own(home: Path, tmp_path: Path) -> None:
    arguments = ["eval", "--model", str(home), "--out", str(tmp_path), "--prompts", "/dev/null", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, "-m", "service", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "headstart: /dev/null: has no prompts\n")


def test_with_the_cache(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run has left, a second one starts from; without a word of the cache it is left alone."""
    cache = ["--cache-folder", str(tmp_path / "latents")]
    drawn = ["--sampler", "ddim", "--steps", "10", *cache, "--quiet", "--out", str(tmp_path / "out")]
    runs = [["--cache", "refresh"], ["--cache", "use"], []]
    found = []
    for run in runs:
        assert evaluated(home, *drawn, *run) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        found.append((results["settings"]["cache"], results["cache"], results["evaluations_per_picture"]))
    assert [mode for mode, *_ in found] == ["refresh", "use", "bypass"]
    assert [cache["hit_rate"] for _, cache, _ in found] == [0, 1, 0]
    skipped = [cache["steps_skipped_per_picture"] for _, cache, _ in found]
    assert skipped == [0, pytest.approx((found[0][2] - found[1][2]) / 2), 0]
    assert skipped[1] > 0
    printed = capsys.readouterr().out
    assert f"cache (use): 100.0% hits, {skipped[1]:.3g} of 10 steps skipped a picture" in printed


def test_a_cache_that_cannot_be_had(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_CACHE", "off")
    assert evaluated(home, "--cache", "use", "--out", str(tmp_path)) == 2
    assert told(capsys) == "--cache: use is not allowed; tiny-bundle has no cache with these settings"
