"""The recipe in miniature: every stage on the CPU, resuming, and the exported folder in stock pipelines."""

import json
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

from models.training.checkpoints import Checkpoints
from models.training.distributed import Clock, Ranks
from models.training.flat import FlatOptimizer
from models.training.pipeline import Run
from models.training.settings import MINIATURE, Budgets
from models.training.text import LENGTH, TextTower

CPU = torch.device("cpu")
RANKS = Ranks(0, 1, CPU, 0.0)
PRESET = replace(MINIATURE, resolution=32, log_every=1000)
STAGES = ("sprites", "vae", "teacher", "lcm", "judge", "export")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A whole run of a few seconds."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run")
    run = Run(PRESET, Budgets(vae=8, teacher=8, lcm=3, judge=1), out / "data", out, RANKS)
    for stage in STAGES:
        run.stage(stage, prompts=2)
    return run, out


def test_losses_fall(finished: tuple[Run, Path]) -> None:
    figures = json.loads((finished[1] / "metrics.json").read_text())
    for stage in ("vae", "teacher"):
        assert figures[stage]["steps"] >= 20
        assert figures[stage]["last_loss"] < 0.9 * figures[stage]["first_loss"], stage
    assert figures["lcm"]["last_loss"] < figures["lcm"]["first_loss"]


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
    tower: TextTower = run._tower
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
    states = run._tower.encode_prompts([prompt])
    from models.training.sampling import start_noise

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
    models = run._models
    from models.training.sampling import sample_ddim, sample_lcm

    null = run._tower.encode_prompts([""])
    ours = sample_ddim(models._teacher, states, null, PRESET.latent, RANKS, guidance=3.0, seed=5)
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
        models._student,
        states,
        PRESET.latent,
        RANKS,
        guidance=2.0,
        guidance_width=PRESET.guidance_width,
        seed=5,
        steps=1,
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def test_shards_and_packs_hold_their_sizes(finished: tuple[Run, Path]) -> None:
    out = finished[1]
    for path in (*out.glob("bundle/**/*.safetensors"), *out.glob("packs/**/*")):
        if path.is_file():
            assert path.stat().st_size <= 16 * 2**20
    assert {path.name for path in (out / "packs").iterdir()} == {"teacher", "lcm", "rest"}


def test_latents_have_unit_variance(finished: tuple[Run, Path]) -> None:
    from models.training.vae import moments

    run = finished[0]
    mean, _ = moments(run._vae, run._scenes.compose(run._scenes.sample(128)))
    deviation = mean.float().std((0, 2, 3))
    np.testing.assert_allclose(deviation.detach().numpy(), 1.0, atol=0.25)


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
