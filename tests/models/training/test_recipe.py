"""The recipe in miniature: one command runs every stage on the CPU, and stock pipelines draw with what it exports."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from models.bundles.manifest import MANIFEST, read_manifest
from models.bundles.verify import check_own
from models.training import painter, pipeline, reference
from models.training import run as command
from models.training.checkpoints import Checkpoints
from models.training.distributed import Clock
from models.training.export import FOLDERS
from models.training.flat import FlatOptimizer
from models.training.lora import merge
from models.training.networks import build_unet
from models.training.pipeline import Run
from models.training.report import NETWORKS, report
from models.training.sampling import FixedBatch, predictor, sample_ddim, sample_lcm, start_noise
from models.training.schedule import SIGMA_MAX, NoiseLevels
from models.training.settings import MINIATURE, Budgets
from models.training.text import LENGTH
from models.training.vae import moments
from tests.models.training.small import CPU, Ticking, ranks

PRESET = replace(MINIATURE, resolution=32, shown=2, searched=2, log_every=1000)
SECONDS = {
    "vae": 8, "scorer": 1, "teacher": 8, "lcm": 1, "lcm-lora": 1, "consistency": 1, "consistency-training": 1,
}  # fmt: skip
NOTHING = Budgets(**dict.fromkeys(command.TIMED, 0.0))
FEW = (1, 2)  # steps of few-step samplers, where the recipe itself goes up to eight
RANKS = ranks()


@dataclass(frozen=True)
class Finished:
    """A whole run: what it printed, where it left its files, and a run that goes on from there."""

    log: str
    out: Path
    run: Run

    def metrics(self, stage: str) -> dict[str, Any]:
        return dict(json.loads((self.out / "metrics" / f"{stage}.json").read_text()))

    def weights(self, stage: str) -> dict[str, Any]:
        done = Checkpoints(self.out / "checkpoints", RANKS).finished(stage)
        assert done is not None
        return dict(done["weights"])

    def predict(self, weights: dict[str, Any], *, guided: bool = False) -> FixedBatch:
        unet = build_unet(PRESET, self.run.tower.width, guided=guided).eval()
        unet.load_state_dict(weights)
        return predictor(unet, "test", 4, RANKS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """`python -m models.training.run --miniature`, in this process and on a clock that counts steps."""
    out = tmp_path_factory.mktemp("run")
    arguments = ["run", "--miniature", "--data", str(out / "data"), "--out", str(out)]
    for stage, seconds in SECONDS.items():
        arguments += [f"--{stage}-seconds", str(seconds)]
    log, verbosity = io.StringIO(), logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(log):
        patch.setattr(command, "MINIATURE", PRESET)
        patch.setattr(command, "join", lambda started: ranks(Ticking()))
        patch.setattr(painter, "STEPS", FEW)
        patch.setattr(reference, "_RENDERS", 1)
        patch.setattr(sys, "argv", arguments)
        assert command.main() == 0
    yield Finished(log.getvalue(), out, Run(PRESET, NOTHING, out / "data", out, ranks()))
    logging.set_verbosity(verbosity)


def test_one_command_runs_every_stage(finished: Finished) -> None:
    for stage in command.STAGES:
        assert f"--- stage {stage} took" in finished.log
    assert "WARNING" not in finished.log
    assert "ring of scale 2 started" in finished.log
    for folder in FOLDERS:
        assert any((finished.out / "bundle" / folder).iterdir())
    sheets = {path.stem for path in (finished.out / "sheets").iterdir()}
    few = {f"{student}-{steps}" for student in ("lcm", "lcm-lora") for steps in FEW}
    assert sheets == {"vae", "ddim-50", "large-ddim-50", *few}
    tables = report({stage: finished.metrics(stage) for stage in SECONDS})
    assert all(f"| {name} |" in tables for name in NETWORKS.values())


def test_losses_fall(finished: Finished) -> None:
    for stage in ("vae", "teacher"):
        figures = finished.metrics(stage)
        assert figures["steps"] >= 80
        assert figures["last_loss"] < 0.9 * figures["first_loss"], stage


def test_the_student_leaves_the_teacher_and_learns_to_read_guidance(finished: Finished) -> None:
    teacher, student = finished.weights("teacher"), finished.weights("lcm")
    assert set(student) - set(teacher) == {"time_embedding.cond_proj.weight"}
    assert float(student["time_embedding.cond_proj.weight"].abs().max()) > 1e-4  # it started at 0
    assert all(value.isfinite().all() for value in student.values())
    assert not torch.equal(student["conv_out.weight"], teacher["conv_out.weight"])


def test_export_keeps_the_weights(finished: Finished) -> None:
    for stage in ("teacher", "lcm"):
        assert finished.metrics(stage)["non_finite_weights"] == 0
        assert finished.metrics(stage)["float16_weights_error"] < 5e-3
    assert finished.metrics("vae")["float16_error"] < 1e-2


def test_time_points_fall_from_pure_noise(finished: Finished) -> None:
    low = NoiseLevels(CPU).low
    for stage in ("consistency", "consistency-training"):
        found = finished.metrics(stage)["sigmas"]
        assert list(found) == [str(steps) for steps in FEW]
        for steps, sigmas in found.items():
            assert len(sigmas) == int(steps)
            assert sigmas[0] == SIGMA_MAX
            assert sigmas == sorted(sigmas, reverse=True)
            assert sigmas[-1] > low


def test_finished_stages_are_skipped(finished: Finished) -> None:
    files = [*finished.out.glob("checkpoints/*"), *finished.out.glob("bundle/**/*"), *finished.out.glob("metrics/*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    for stage in SECONDS:
        finished.run.stage(stage)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_stage_interrupted_after_its_training_only_exports(finished: Finished) -> None:
    checkpoint, figures = finished.out / "checkpoints" / "lcm.pt", finished.metrics("lcm")
    before = checkpoint.stat().st_mtime_ns
    shutil.rmtree(finished.out / "bundle" / "unet_lcm")
    (finished.out / "metrics" / "lcm.json").unlink()
    finished.run.stage("lcm")
    assert finished.metrics("lcm") == figures
    assert (finished.out / "bundle" / "unet_lcm" / "config.json").exists()
    assert checkpoint.stat().st_mtime_ns == before


def test_latents_have_unit_variance(finished: Finished) -> None:
    run = finished.run
    mean, _ = moments(run.vae, run.scenes.compose(run.scenes.sample(128), PRESET.resolution))
    np.testing.assert_allclose(mean.std((0, 2, 3)).numpy(), 1.0, atol=0.25)


PROMPT = "a red heart on a white background"


def _stock(finished: Finished, kind: type, unet: str, scheduler: Any, folder: str) -> Any:
    """A stock pipeline on the exported folders, with the run's text tower."""
    tower, bundle = finished.run.tower, finished.out / "bundle"
    tower.model.config.use_attention_mask = True
    pipe = kind(
        unet=UNet2DConditionModel.from_pretrained(bundle / unet, torch_dtype=torch.float32),
        scheduler=scheduler.from_pretrained(bundle / folder),
        vae=AutoencoderKL.from_pretrained(bundle / "vae", torch_dtype=torch.float32),
        text_encoder=tower.model,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tower.tokenizer, model_max_length=LENGTH, pad_token="[PAD]", unk_token="[UNK]"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _theirs(pipe: Any, steps: int, guidance: float) -> torch.Tensor:
    latents: torch.Tensor = pipe(
        PROMPT, latents=start_noise(1, PRESET.latent, 5, RANKS), num_inference_steps=steps, guidance_scale=guidance,
        output_type="latent", height=PRESET.resolution, width=PRESET.resolution,
    ).images  # fmt: skip
    return latents


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_the_stock_pipeline_draws_with_the_teacher(finished: Finished) -> None:
    pipe, tower = _stock(finished, StableDiffusionPipeline, "unet", DDIMScheduler, "scheduler"), finished.run.tower
    states, null = tower.encode_prompts([PROMPT]), tower.encode_prompts([""])
    torch.testing.assert_close(pipe.encode_prompt(PROMPT, CPU, 1, False)[0], states)
    predict = finished.predict(finished.weights("teacher"))
    ours = sample_ddim(predict, states, null, PRESET.latent, RANKS, guidance=3.0, seed=5, steps=10)
    assert _error(ours, _theirs(pipe, 10, 3.0)) < 2e-2


def _ours(finished: Finished, predict: FixedBatch, guidance: float | None) -> torch.Tensor:
    """At one step, where the stock pipeline draws no noise of its own."""
    return sample_lcm(
        predict, finished.run.tower.encode_prompts([PROMPT]), PRESET.latent, RANKS, guidance=guidance,
        guidance_width=PRESET.guidance_width, seed=5, steps=1,
    )  # fmt: skip


def test_the_stock_pipeline_draws_with_the_lcm(finished: Finished) -> None:
    pipe = _stock(finished, LatentConsistencyModelPipeline, "unet_lcm", LCMScheduler, "scheduler_lcm")
    ours = _ours(finished, finished.predict(finished.weights("lcm"), guided=True), 2.0)
    assert _error(ours, _theirs(pipe, 1, 2.0)) < 2e-2


def test_the_stock_pipeline_draws_with_the_lcm_lora(finished: Finished) -> None:
    pipe = _stock(finished, StableDiffusionPipeline, "unet", DDIMScheduler, "scheduler")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    plain = _theirs(pipe, 1, 1.0)
    pipe.load_lora_weights(finished.out / "bundle" / "lora", weight_name="lcm.safetensors")
    ours = _ours(finished, finished.predict(merge(finished.weights("teacher"), finished.weights("lcm-lora"))), None)
    assert _error(ours, _theirs(pipe, 1, 1.0)) < 0.2 * _error(ours, plain)
    assert _error(ours, _theirs(pipe, 1, 1.0)) < 2e-2


def test_shards_and_pieces_of_packs_are_small(finished: Finished) -> None:
    for path in (*finished.out.glob("bundle/**/*.safetensors"), *finished.out.glob("packs/*/*")):
        assert path.stat().st_size <= 16 * 2**20


def test_packs_joined_hold_the_bundle_the_figures_and_the_sheets(finished: Finished, tmp_path: Path) -> None:
    for folder in (finished.out / "packs").iterdir():
        joined = b"".join(piece.read_bytes() for piece in sorted(folder.glob(f"{folder.name}.tar.*")))
        with tarfile.open(fileobj=io.BytesIO(joined)) as tar:
            tar.extractall(tmp_path, filter="data")
    kept = ("bundle", "metrics", "sheets", "unshipped")
    files = [path.relative_to(finished.out) for name in kept for path in finished.out.glob(f"{name}/**/*.*")]
    assert {file.parts[0] for file in files} == set(kept)
    for file in files:
        assert (tmp_path / file).read_bytes() == (finished.out / file).read_bytes()


def _older_bundle(folder: Path) -> Path:
    """An older version of a bundle, with a file that the new one lacks and one that it keeps."""
    for name in ("unet/old.safetensors", "text_encoder/config.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
    facts = dict.fromkeys(("name", "version", "description", "licence"), "test")
    (folder / MANIFEST).write_text(json.dumps(facts | {"sources": {}, "files": {}, "training": {"old": 1}}))
    return folder


@pytest.fixture(scope="module")
def published(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = _older_bundle(tmp_path_factory.mktemp("published") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["run", "--stage", "publish", "--out", str(finished.out), "--bundle", str(bundle)]
        patch.setattr(sys, "argv", arguments)
        assert command.main() == 0
    return bundle


def test_publish_ends_in_a_sealed_bundle(finished: Finished, published: Path) -> None:
    manifest = read_manifest(published)
    check_own(manifest, published)
    assert {file.path.split("/")[0] for file in manifest.files} == {*FOLDERS, "text_encoder"}
    assert not (published / "unet" / "old.safetensors").exists()
    written = json.loads((published / MANIFEST).read_text())
    assert set(written["training"]) == set(SECONDS)
    assert written["training"]["teacher"]["steps"] == finished.metrics("teacher")["steps"]
    assert written["training"]["vae"]["psnr"] == float(f"{finished.metrics('vae')['psnr']:.4g}")
    consistency, lora = written["students"]["consistency"], written["loras"]["lcm-lora"]
    assert consistency["sigmas"] == written["training"]["consistency"]["sigmas"]
    assert (consistency["sigma_max"], consistency["sigma_data"]) == (SIGMA_MAX, 1)
    assert lora["sampler"] == "lcm"
    for file in (consistency["lora"], lora["file"]):
        assert (published / file).is_file()


def told(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that the caller can mend says, in one line."""
    monkeypatch.setattr(command, "join", lambda started: ranks(Ticking()))
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    assert command.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_publish_before_the_run_is_finished_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = _older_bundle(tmp_path / "bundle")
    before = (bundle / MANIFEST).read_bytes()
    arguments = ["--stage", "publish", "--out", str(tmp_path / "out"), "--bundle"]
    assert told([*arguments, str(bundle)], monkeypatch, capsys).endswith("is missing: run every stage first")
    assert told([*arguments, str(tmp_path)], monkeypatch, capsys).endswith(f"{tmp_path / MANIFEST} is missing")
    assert (bundle / MANIFEST).read_bytes() == before
    assert (bundle / "unet" / "old.safetensors").exists()


def test_stages_out_of_order_and_a_student_to_start_from_are_told_in_one_line(
    finished: Finished,
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "MINIATURE", PRESET)
    arguments = ["--miniature", "--data", str(tmp_path), "--out", str(tmp_path), "--given", str(published), "--stage"]
    line = told([*arguments, "lcm"], monkeypatch, capsys)
    assert line == "models.training.run: stage 'teacher' is not finished: run it first"
    start = tmp_path / "start"
    shutil.copytree(published / "unet_lcm", start / "unet")
    line = told([*arguments, "teacher", "--start-from", str(start)], monkeypatch, capsys)
    assert line == f"models.training.run: {start / 'unet'} is an LCM student, where the teacher is expected"
    line = told([*arguments, "teacher", "--start-from", str(tmp_path / "none")], monkeypatch, capsys)
    assert line == f"models.training.run: {tmp_path / 'none' / 'unet'} holds no weights"


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.float() for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_a_run_starts_from_an_earlier_one(finished: Finished, tmp_path: Path) -> None:
    """Without any time to train, what comes out is what went in."""
    bundle = finished.out / "bundle"
    run = Run(PRESET, NOTHING, tmp_path, tmp_path, ranks(), start=bundle)
    for stage in ("vae", "teacher"):
        run.stage(stage)
    earlier, later = _read(bundle / "unet"), _read(tmp_path / "bundle" / "unet")
    assert all(torch.equal(value, later[name]) for name, value in earlier.items())
    earlier, later = _read(bundle / "vae"), _read(tmp_path / "bundle" / "vae")
    rescaled = ("quant_conv.", "post_quant_conv.")  # its latents are normalised once more
    assert all(torch.equal(value, later[name]) for name, value in earlier.items() if not name.startswith(rescaled))


def test_given_parts_are_not_trained(
    finished: Finished, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(PRESET, NOTHING, tmp_path, tmp_path, ranks(), given=published)
    for stage in ("vae", "scorer"):
        run.stage(stage)
        theirs, ours = published / stage, tmp_path / "bundle" / stage
        assert {path.name: path.read_bytes() for path in ours.iterdir()} == {
            path.name: path.read_bytes() for path in theirs.iterdir()
        }
        figures = json.loads((tmp_path / "metrics" / f"{stage}.json").read_text())
        assert figures == json.loads((published / MANIFEST).read_text())["training"][stage]
    assert not list((tmp_path / "checkpoints").iterdir())
    passed: list[Any] = []
    monkeypatch.setattr(pipeline, "make_reference", lambda *arguments: passed.extend(arguments))
    run.stage("reference")
    _, _, _, scorer, vae, _ = passed
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in _read(published / "vae").items())
    network = scorer.network.state_dict()
    assert all(torch.equal(value, network[name]) for name, value in _read(published / "scorer").items())


def test_parts_that_are_not_given_are_trained(published: Path, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    shutil.copytree(published / "scorer", tmp_path / "given" / "scorer")
    run = Run(PRESET, NOTHING, tmp_path, tmp_path / "out", ranks(), given=tmp_path / "given")
    run.stage("vae")
    assert (tmp_path / "out" / "checkpoints" / "vae.pt").exists()


def test_an_interrupted_stage_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Time spent before the interruption counts, so both runs together take as many steps as one."""
    budgets = replace(NOTHING, vae=400)

    def steps_of_vae(out: Path, clock: Ticking) -> int:
        Run(PRESET, budgets, tmp_path, out, ranks(clock)).stage("vae")
        return int(json.loads((out / "metrics" / "vae.json").read_text())["steps"])

    whole = steps_of_vae(tmp_path / "whole", Ticking(step=100))
    out = tmp_path / "parts"
    with pytest.raises(InterruptedError):
        steps_of_vae(out, Ticking(step=100, readings=6))
    state = Checkpoints(out / "checkpoints", RANKS).load("vae")
    assert state is not None
    assert not state["finished"]
    saved = state["optimizer"]["iterations"]
    assert 0 < saved < whole
    total = steps_of_vae(out, Ticking(step=100))
    assert f"vae: resumed at step {saved}" in capsys.readouterr().out
    assert saved < total <= whole + 20


def test_resume_continues_exactly(tmp_path: Path) -> None:
    """Ten steps, or five, a checkpoint, and five more, end in the same weights."""

    def train(optimizer: FlatOptimizer, net: torch.nn.Linear, steps: range) -> None:
        for step in steps:
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            (net(inputs) - 1).square().mean().backward()
            optimizer.step(1e-2)

    def fresh() -> tuple[torch.nn.Linear, FlatOptimizer]:
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 2)
        return net, FlatOptimizer(net, RANKS, average=0.9)

    net, whole = fresh()
    train(whole, net, range(10))
    net, first = fresh()
    train(first, net, range(5))
    checkpoints = Checkpoints(tmp_path, RANKS)
    checkpoints.save("stage", {"optimizer": first.state(), "seconds": 12.0}, finished=False)
    net, second = fresh()
    assert checkpoints.finished("stage") is None
    assert checkpoints.resume("stage", second) == 12.0
    assert Clock(RANKS, 12.0).read(20) == 12.0
    train(second, net, range(5, 10))
    torch.testing.assert_close(second.master, whole.master, rtol=0, atol=0)
    torch.testing.assert_close(second.ema, whole.ema, rtol=0, atol=0)


def test_every_rank_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here they only say who they are."""
    say = "import os, sys; print(*(os.environ[name] for name in ('RANK', 'RANKS', 'RENDEZVOUS')), *sys.argv[1:])"
    logs: list[Path] = []

    def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        logs.append(tmp_path / f"{len(logs)}.txt")
        with logs[-1].open("wb") as log:
            return subprocess.Popen([sys.executable, "-c", say, *arguments], env=environment, stdout=log)

    monkeypatch.setattr(command, "_start", start)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["run", "--ranks", "2", "--stage", "vae", "--out", str(tmp_path)])
    assert command.main() == 0
    (first, *same), (second, *others) = (log.read_text().split() for log in logs)
    assert (first, second) == ("0", "1")
    assert same == others
    assert same[0] == "2"
    assert same[2:] == ["--ranks", "2", "--stage", "vae", "--out", str(tmp_path)]


def test_one_failed_rank_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pause(0.05))
    workers = [subprocess.Popen([sys.executable, "-c", code]) for code in ("import time; time.sleep(60)", "exit(3)")]
    assert command._wait(workers, None, {}) == 1
    assert workers[0].wait(10) != 0


def test_stages_are_named_one_by_one_or_together() -> None:
    assert command.parse([]).stage == command.STAGES
    assert command.parse(["--stage", "teacher,lcm"]).stage == ("teacher", "lcm")
    assert command.parse(["--stage", "carry"]).stage == ("carry",)
    for wrong in ("export", "vae,publish", ""):
        with pytest.raises(SystemExit):
            command.parse(["--stage", wrong])


def test_budgets_are_the_presets_unless_given() -> None:
    usual = command.budgets(command.parse([]))
    given = command.budgets(command.parse(["--lcm-lora-seconds", "7"]))
    assert given == replace(usual, lcm_lora=7)
    assert command.budgets(command.parse(["--miniature"])).teacher < usual.teacher


def test_ranks_use_the_gpus_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert command._gpu(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [command._gpu(rank) for rank in (0, 1)] == ["4", "6"]
