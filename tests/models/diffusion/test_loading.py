"""Folders that are whole load; all others end in one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.diffusion.loaded import LoadedModel
from models.diffusion.loading import load_model
from models.errors import ModelError
from tests import tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(source: Path | str, **arguments: Any) -> LoadedModel:
    defaults = {"dtype": "float32", "device": "cpu", "cache_dir": Path(source) / "cache"}
    return load_model(str(source), **defaults | arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("build", "kind", "default", "samplers"),
    [
        (tiny.sd, "sd", "dpmpp_2m", {"ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde"}),
        (tiny.sd2, "sd", "dpmpp_2m", {"ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde"}),
        (tiny.sdxl, "sdxl", "dpmpp_2m", {"ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde"}),
        (tiny.lcm, "lcm", "lcm", {"lcm"}),
        (tiny.bundle, "sd", "lcm", {"ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "lcm"}),
        (tiny.consistency, "consistency", "consistency", {"consistency"}),
    ],
)
def test_card(tmp_path: Path, build: Callable[[Path], Path], kind: str, default: str, samplers: set[str]) -> None:
    card = load(build(tmp_path / "model")).card
    assert (card.kind, card.default_sampler, set(card.samplers)) == (kind, default, samplers)
    assert (card.name, card.revision) == ("model", "local")
    text = {"bundle": tiny.BERT_LENGTH, "consistency": None}.get(build.__name__, tiny.CLIP_LENGTH)
    assert card.max_prompt_tokens == text
    pixels = build is tiny.consistency
    assert card.default_size == ((16, 16) if pixels else (64, 64))
    assert (card.scale, card.latent_channels) == ((1, 3) if pixels else (8, 4))


def test_bundle_runs_lcm_on_its_student(tmp_path: Path) -> None:
    model = load(tiny.bundle(tmp_path / "model"))
    student = model.denoiser("lcm")
    others = {id(model.denoiser(name)) for name in model.card.samplers if name != "lcm"}
    assert len(others) == 1
    assert id(student) not in others


def test_students_load_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny.bundle_with_loras(tmp_path / "model")
    capfd.readouterr()
    assert load(folder, dtype="bfloat16").card.loras == ("lcm-lora", "tuned")
    assert capfd.readouterr() == ("", "")


def test_weights_are_the_files(whole: Path) -> None:
    model = load(whole)
    loaded = model.denoiser("ddim")._unet.state_dict()  # type: ignore[union-attr]
    stored = load_file(whole / "unet" / WEIGHTS)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key]) for key in stored)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_every_part(tmp_path: Path, dtype: str) -> None:
    model = load(tiny.sdxl(tmp_path / "model"), dtype=dtype)
    expected = getattr(torch, dtype)
    assert model.dtype == model.denoiser("ddim")._unet.dtype == expected  # type: ignore[union-attr]
    assert model.text is not None
    assert all(tower.encoder.dtype == expected for tower in model.text.towers)
    # This VAE's config says force_upcast: it overflows in float16, and only there.
    assert model.decoder._vae.dtype == (torch.float32 if dtype == "float16" else expected)  # type: ignore[attr-defined]


def test_sharded_weights(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = load_file(folder / "unet" / WEIGHTS)
    keys = sorted(state)
    halves = {"a": keys[: len(keys) // 2], "b": keys[len(keys) // 2 :]}
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, half in enumerate(halves.values(), 1):
        name = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({key: state[key] for key in half}, folder / "unet" / name, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(half, name)
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / "unet" / WEIGHTS).unlink()
    assert load(folder).card.kind == "sd"
    assert capfd.readouterr() == ("", "")
    second = folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shutil.copy(folder / "vae" / WEIGHTS, second)  # whole, and not the shard that the index means
    with pytest.raises(ModelError, match=r"00002-of-00002\.safetensors lacks .*weight"):
        load(folder)
    second.unlink()
    with pytest.raises(ModelError, match=r"00002-of-00002\.safetensors is missing"):
        load(folder)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), r"model_index\.json is missing"),
    "index not JSON": (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json cannot be read"),
    "index of nothing": (lambda f: (f / "model_index.json").write_text("{}"), "names no pipeline"),
    "other pipeline": (
        lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"),
        "FluxPipeline; served are StableDiffusionPipeline, ",
    ),
    "other UNet": (
        lambda f: edit_json(f / "model_index.json", unet=["diffusers", "UNet3DConditionModel"]),
        "unet is a UNet3DConditionModel; served are UNet2DConditionModel",
    ),
    "no VAE named": (lambda f: edit_json(f / "model_index.json", vae=[None, None]), "names no vae"),
    "no VAE folder": (lambda f: shutil.rmtree(f / "vae"), r"vae is missing, though .*model_index\.json names it"),
    "no config": (lambda f: (f / "unet" / "config.json").unlink(), r"unet/config\.json is missing"),
    "no weights": (lambda f: (f / "unet" / WEIGHTS).unlink(), "unet holds no weights"),
    "no text weights": (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "text_encoder holds no weights"),
    "cut short": (
        lambda f: (f / "vae" / WEIGHTS).write_bytes((f / "vae" / WEIGHTS).read_bytes()[:-100]),
        rf"vae/{WEIGHTS} is damaged or cut short",
    ),
    "missing key": (
        lambda f: edit_weights(f / "unet" / WEIGHTS, lambda state: state.pop("conv_in.weight")),
        rf"unet/{WEIGHTS} lacks conv_in\.weight",
    ),
    "missing text key": (
        lambda f: edit_weights(
            f / "text_encoder" / "model.safetensors",
            lambda state: state.pop(next(key for key in state if key.endswith("final_layer_norm.weight"))),
        ),
        r"text_encoder/model\.safetensors lacks .*final_layer_norm\.weight",
    ),
    "unknown key": (
        lambda f: edit_weights(f / "vae" / WEIGHTS, lambda state: state.update(stray=torch.zeros(1))),
        rf"vae/{WEIGHTS} has unknown stray",
    ),
    "wrong shape": (
        lambda f: edit_weights(f / "unet" / WEIGHTS, lambda state: state.update({"conv_in.bias": torch.zeros(5)})),
        rf"unet/{WEIGHTS} has wrong shapes for conv_in\.bias",
    ),
    "wrong text shape": (
        lambda f: edit_json(f / "text_encoder" / "config.json", intermediate_size=16),
        r"text_encoder/model\.safetensors has wrong shapes for .*fc1",
    ),
    "inpainting": (lambda f: edit_json(f / "unet" / "config.json", in_channels=9), "in_channels 9 is not out_channels"),
    "no size": (
        lambda f: edit_json(f / "unet" / "config.json", sample_size=None),
        r"unet/config\.json: sample_size is missing",
    ),
    "class conditioning": (
        lambda f: edit_json(f / "unet" / "config.json", class_embed_type="timestep"),
        r"unet/config\.json: class_embed_type is 'timestep'; served in a StableDiffusionPipeline is None",
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in (f / "tokenizer").iterdir()],
        "tokenizer holds no vocabulary",
    ),
    "no scheduler": (
        lambda f: (f / "scheduler" / "scheduler_config.json").unlink(),
        r"scheduler/scheduler_config\.json is missing",
    ),
    "unknown betas": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid"),
        r"scheduler/scheduler_config\.json: .*sigmoid",
    ),
    "unknown prediction": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction"),
        "flow_prediction",
    ),
    "epsilon without signal": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True),
        "epsilon cannot run with rescale_betas_zero_snr",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_clear_line(folder: Path, fault: str, capfd: pytest.CaptureFixture[str]) -> None:
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # the libraries' own warnings stay inside


def test_components_made_for_other_models(tmp_path: Path) -> None:
    folder, other = tiny.sd(tmp_path / "model"), tiny.sd2(tmp_path / "other")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(other / "text_encoder", folder / "text_encoder")
    with pytest.raises(ModelError, match="the text encoder gives 64 features, the UNet takes 32"):
        load(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of auto, float32, bfloat16, float16"),
        ({"device": "tpu"}, "device 'tpu' is not one of auto, cpu, cuda, cuda:N"),
        ({"device": "meta"}, "device 'meta' is not one of"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
    ],
)
def test_bad_arguments(whole: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(whole, **arguments)


def test_unknown_source(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'~no-such-user/model' is neither a bundle"):
        load_model("~no-such-user/model", cache_dir=tmp_path)
    with pytest.raises(ModelError, match=r"'no such model' is neither a bundle \(default\), nor"):
        load_model("no such model", cache_dir=tmp_path)


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"nobody/nothing@v9 is not in .* and the hub cannot be reached") as caught:
        load_model("nobody/nothing", revision="v9", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_hub_id_and_revision(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    """From the hub client's own cache, so that no network is needed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commits = {"main": "a" * 40, "v1": "b" * 40}
    repository = tmp_path / "hub" / "models--nobody--tiny"
    (repository / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(whole, repository / "snapshots" / commit)
    edit_json(repository / "snapshots" / commits["v1"] / "scheduler" / "scheduler_config.json", steps_offset=0)
    model = load("nobody/tiny", revision=revision, cache_dir=tmp_path)
    assert (model.card.name, model.card.source) == ("nobody/tiny", "nobody/tiny")
    assert model.card.revision == commits[revision or "main"]
    assert model.schedule("ddim").steps_offset == (0 if revision else 1)


def test_auto_dtype_is_one_of_two_on_cpu(whole: Path) -> None:
    assert load(whole, dtype="auto").dtype in (torch.float32, torch.bfloat16)
