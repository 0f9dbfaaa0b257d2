"""The recipe in miniature: every stage on the CPU, resuming, and the exported folder in stock pipelines."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

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
from transformers import PreTrainedTokenizerFast

from models.bundles.manifest import MANIFEST, read_manifest
from models.bundles.verify import check_own
from models.training import run as command
from models.training.captions import CaptionWriter
from models.training.checkpoints import Checkpoints
from models.training.concepts import select
from models.training.distributed import Clock, Ranks
from models.training.export import FOLDERS
from models.training.flat import FlatOptimizer
from models.training.pipeline import Run
from models.training.report import report
from models.training.sampling import sample_ddim, sample_lcm, start_noise
from models.training.settings import MINIATURE, Budgets
from models.training.text import LENGTH
from models.training.vae import moments

CPU = torch.device("cpu")
PRESET = replace(MINIATURE, resolution=32, log_every=1000)
STAGES = ("sprites", "vae", "teacher", "lcm", "judge", "export")


class StoppedError(Exception):
    pass


class Ticking:
    """A clock that moves on by `step` seconds a reading, so that budgets are numbers of steps on any machine.

    Stages read it twice every 20 steps, or three times when a checkpoint is due.
    """

    def __init__(self, step: float = 1.0, readings: int | None = None) -> None:
        """With `readings`, the reading after that many raises StoppedError."""
        self.step, self.left, self.seconds = step, readings, 0.0

    def __call__(self) -> float:
        if self.left is not None:
            if self.left == 0:
                raise StoppedError
            self.left -= 1
        self.seconds += self.step
        return self.seconds


def ranks(clock: Ticking) -> Ranks:
    return Ranks(0, 1, CPU, 0.0, clock)


RANKS = ranks(Ticking())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny kernels: more threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A whole run: about 160 steps of the VAE, 140 of the teacher, 40 of the student, 20 of the judge."""
    out = tmp_path_factory.mktemp("run")
    run = Run(PRESET, Budgets(vae=14, teacher=12, lcm=2, judge=1), out / "data", out, ranks(Ticking()))
    for stage in STAGES:
        run.stage(stage, prompts=2)
    return run, out


def test_losses_fall(finished: tuple[Run, Path]) -> None:
    figures = json.loads((finished[1] / "metrics.json").read_text())
    for stage in ("vae", "teacher"):
        assert figures[stage]["steps"] >= 100
        assert figures[stage]["last_loss"] < 0.9 * figures[stage]["first_loss"], stage


def test_the_student_leaves_the_teacher_and_learns_to_read_guidance(finished: tuple[Run, Path]) -> None:
    weights = {name: Checkpoints(finished[1] / "checkpoints", RANKS).finished(name) for name in ("teacher", "lcm")}
    teacher, student = (weights[name]["weights"] for name in ("teacher", "lcm"))
    assert set(student) - set(teacher) == {"time_embedding.cond_proj.weight"}
    assert float(student["time_embedding.cond_proj.weight"].abs().max()) > 1e-4  # it started at 0
    assert all(value.isfinite().all() for value in student.values())
    assert not torch.equal(student["conv_out.weight"], teacher["conv_out.weight"])


def test_export_keeps_the_weights(finished: tuple[Run, Path]) -> None:
    figures = json.loads((finished[1] / "metrics.json").read_text())["export"]
    for part in ("unet", "unet_lcm"):
        assert figures[part]["non_finite_weights"] == 0
        assert figures[part]["float16_weights_error"] < 5e-3
    assert figures["vae"]["float16_error"] < 1e-2


def test_finished_stages_are_skipped(finished: tuple[Run, Path]) -> None:
    run, out = finished
    before = (out / "checkpoints" / "teacher.pt").stat().st_mtime_ns
    for stage in ("vae", "teacher", "lcm", "judge"):
        run.stage(stage, prompts=2)
    assert (out / "checkpoints" / "teacher.pt").stat().st_mtime_ns == before


def _pipeline_parts(run: Run, bundle: Path) -> dict[str, object]:
    tower = run.tower
    tower.model.config.use_attention_mask = True
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tower.tokenizer, model_max_length=LENGTH, pad_token="[PAD]", unk_token="[UNK]"
    )
    return {
        "vae": AutoencoderKL.from_pretrained(bundle / "vae", torch_dtype=torch.float32),
        "text_encoder": tower.model,
        "tokenizer": tokenizer,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def test_stock_pipelines_load_and_agree_with_ours(finished: tuple[Run, Path]) -> None:
    run, out = finished
    bundle = out / "bundle"
    parts = _pipeline_parts(run, bundle)
    prompt = "a blue heart on a red background"
    states = run.tower.encode_prompts([prompt])
    noise = start_noise(1, PRESET.latent, 5, RANKS)
    teacher = StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_pretrained(bundle / "unet", torch_dtype=torch.float32),
        scheduler=DDIMScheduler.from_pretrained(bundle / "scheduler"),
        **parts,
    )
    teacher.set_progress_bar_config(disable=True)
    embeds, _ = teacher.encode_prompt(prompt, CPU, 1, False)
    torch.testing.assert_close(embeds, states)
    theirs = teacher(
        prompt, latents=noise, num_inference_steps=50, guidance_scale=3.0, output_type="latent",
        height=PRESET.resolution, width=PRESET.resolution,
    ).images  # fmt: skip
    null = run.tower.encode_prompts([""])
    ours = sample_ddim(run.models.teacher, states, null, PRESET.latent, RANKS, guidance=3.0, seed=5)
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2

    student = LatentConsistencyModelPipeline(
        unet=UNet2DConditionModel.from_pretrained(bundle / "unet_lcm", torch_dtype=torch.float32),
        scheduler=LCMScheduler.from_pretrained(bundle / "scheduler_lcm"),
        **parts,
    )
    student.set_progress_bar_config(disable=True)
    theirs = student(
        prompt, latents=noise, num_inference_steps=1, guidance_scale=2.0, output_type="latent",
        height=PRESET.resolution, width=PRESET.resolution,
    ).images  # fmt: skip
    ours = sample_lcm(
        run.models.student,
        states,
        PRESET.latent,
        RANKS,
        guidance=2.0,
        guidance_width=PRESET.guidance_width,
        seed=5,
        steps=1,
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def test_shards_and_pieces_of_packs_are_small(finished: tuple[Run, Path]) -> None:
    out = finished[1]
    for path in (*out.glob("bundle/**/*.safetensors"), *out.glob("packs/*/*")):
        assert path.stat().st_size <= 16 * 2**20


def test_packs_joined_hold_the_bundle_and_the_figures(finished: tuple[Run, Path], tmp_path: Path) -> None:
    out = finished[1]
    for folder in (out / "packs").iterdir():
        joined = b"".join(piece.read_bytes() for piece in sorted(folder.glob(f"{folder.name}.tar.*")))
        with tarfile.open(fileobj=io.BytesIO(joined)) as tar:
            tar.extractall(tmp_path, filter="data")
    files = [path.relative_to(out) for path in out.glob("bundle/**/*") if path.is_file()]
    assert len(files) >= 2 * len(FOLDERS) - 2  # a configuration each, and weights but for the schedulers
    for file in (*files, Path("metrics.json")):
        assert (tmp_path / file).read_bytes() == (out / file).read_bytes()


def test_latents_have_unit_variance(finished: tuple[Run, Path]) -> None:
    run = finished[0]
    mean, _ = moments(run.vae, run.scenes.compose(run.scenes.sample(128)))
    deviation = mean.float().std((0, 2, 3))
    np.testing.assert_allclose(deviation.detach().numpy(), 1.0, atol=0.25)


def test_captions_are_tokenised_as_the_tokenizer_would(finished: tuple[Run, Path]) -> None:
    run = finished[0]
    writer = CaptionWriter(select(PRESET.icons), run.tower)
    slots = writer.slots(run.scenes.sample(200))
    texts = writer.texts(slots)
    assert len(set(texts)) > 100
    torch.testing.assert_close(writer.tokens(slots), run.tower.tokens(texts), rtol=0, atol=0)


def _bundle(folder: Path) -> Path:
    """An older version of a bundle, with a file that the new one lacks and one that it keeps."""
    for name in ("unet/old.safetensors", "text_encoder/config.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
    facts = dict.fromkeys(("name", "version", "description", "licence"), "test")
    (folder / MANIFEST).write_text(json.dumps(facts | {"sources": {}, "files": {}, "training": {"old": 1}}))
    return folder


def test_publish_ends_in_a_sealed_bundle(
    finished: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, bundle = finished[1], _bundle(tmp_path / "bundle")
    monkeypatch.setattr(sys, "argv", ["run", "--stage", "publish", "--out", str(out), "--bundle", str(bundle)])
    assert command.main() == 0
    manifest = read_manifest(bundle)
    check_own(manifest, bundle)
    assert {file.path.split("/")[0] for file in manifest.files} == {*FOLDERS, "text_encoder"}
    assert not (bundle / "unet" / "old.safetensors").exists()
    training = json.loads((bundle / MANIFEST).read_text())["training"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert training.keys() == metrics.keys()
    assert training["teacher"]["steps"] == metrics["teacher"]["steps"]
    assert training["vae"]["psnr"] == float(f"{metrics['vae']['psnr']:.4g}")


def test_publish_without_an_export_changes_nothing(
    finished: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _bundle(tmp_path / "bundle")
    before = (bundle / MANIFEST).read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    arguments = ["run", "--stage", "publish", "--out", str(tmp_path / "out"), "--bundle", str(bundle)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(FileNotFoundError, match="run the export stage first"):
        command.main()
    assert (bundle / MANIFEST).read_bytes() == before
    assert (bundle / "unet" / "old.safetensors").exists()


def test_an_interrupted_stage_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Time spent before the interruption counts, so both runs together take as many steps as one."""
    budgets = Budgets(vae=600, teacher=0, lcm=0, judge=0)

    def steps_of_vae(out: Path, clock: Ticking) -> int:
        Run(PRESET, budgets, tmp_path, out, ranks(clock)).stage("vae", prompts=0)
        return int(json.loads((out / "metrics.json").read_text())["vae"]["steps"])

    whole = steps_of_vae(tmp_path / "whole", Ticking(step=100))
    out = tmp_path / "parts"
    with pytest.raises(StoppedError):
        steps_of_vae(out, Ticking(step=100, readings=9))
    state = Checkpoints(out / "checkpoints", RANKS).load("vae")
    assert state is not None
    assert not state["finished"]
    saved = state["optimizer"]["iterations"]
    assert 0 < saved < whole
    total = steps_of_vae(out, Ticking(step=100))
    assert f"vae: resumed at step {saved}" in capsys.readouterr().out
    assert saved < total <= whole + 20


def test_one_command_runs_every_stage(tmp_path: Path) -> None:
    arguments = ["--miniature", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--eval-prompts", "1"]
    for stage in ("vae", "teacher", "lcm", "judge"):
        arguments += [f"--{stage}-seconds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "models.training.run", *arguments], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in command.STAGES:
        assert f"--- stage {stage} took" in done.stdout
    for folder in FOLDERS:
        assert any((tmp_path / "out" / "bundle" / folder).iterdir())
    assert (tmp_path / "out" / "sheets" / "ddim-50.webp").stat().st_size > 0
    tables = report(json.loads((tmp_path / "out" / "metrics.json").read_text()))
    assert "| teacher |" in tables
    assert "ddim-50 g3" in tables


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
