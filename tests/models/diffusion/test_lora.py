"""LoRA files draw what the stock pipeline draws with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.diffusion.folder import quiet_libraries
from models.diffusion.loaded import LoadedModel
from models.diffusion.loading import load_model
from models.errors import LoraError
from tests import tiny
from tests.models.diffusion.test_equivalence import LEAST_PSNR, draw, noise_for, psnr, stock

UNET_LAYERS = ("attn1.to_q", "attn2.to_v", "ff.net.0.proj")
TEXT_LAYERS = ("q_proj", "out_proj", "fc1")  # diffusers knows kohya's attention layers by their out_proj
RANK = 4


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd(tmp_path_factory.mktemp("sd") / "model")


def lora_weights(folder: Path, seed: int, *, text: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random (down, up) for some layers, by "unet.", "text_encoder." or "text_encoder_2." and the layer's name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for part, file, layers in (
        ("unet", "diffusion_pytorch_model.safetensors", UNET_LAYERS),
        ("text_encoder", "model.safetensors", TEXT_LAYERS if text else ()),
        ("text_encoder_2", "model.safetensors", TEXT_LAYERS if text else ()),
    ):
        if not (folder / part).is_dir():
            continue
        for key, value in load_file(folder / part / file).items():
            if key.endswith(tuple(f".{layer}.weight" for layer in layers)):
                down = torch.randn(RANK, value.shape[1], generator=generator) / value.shape[1] ** 0.5
                up = torch.randn(value.shape[0], RANK, generator=generator)
                weights[f"{part}.{key.removesuffix('.weight')}"] = down, up
    return weights


def save_peft(path: Path, weights: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    state = {}
    for name, (down, up) in weights.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down, up
    save_file(state, path)
    return path


def save_kohya(path: Path, weights: dict[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> Path:
    xl = any(name.startswith("text_encoder_2.") for name in weights)
    prefixes = {"unet": "unet", "text_encoder": "te1" if xl else "te", "text_encoder_2": "te2"}
    state = {}
    for name, (down, up) in weights.items():
        part, layer = name.split(".", 1)
        if part != "unet" and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"  # the name has this prefix in every kohya file
        stem = f"lora_{prefixes[part]}_{layer.replace('.', '_')}"
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def load(folder: Path, loras: list[tuple[str, str]]) -> LoadedModel:
    return load_model(str(folder), dtype="float32", device="cpu", loras=loras, cache_dir=folder / "cache")


def picture(model: LoadedModel, sampler: str = "ddim") -> np.ndarray:
    conditions = model.encode([("a red fox", "")], [5.0], sampler, model.card.default_size)
    return draw(model, sampler, 3, conditions, noise_for(model, 1))


def stock_picture(pipeline: Any, model: LoadedModel) -> np.ndarray:
    arguments = {"guidance_scale": 5.0, "num_inference_steps": 3, "output_type": "np"}
    return np.asarray(pipeline("a red fox", latents=noise_for(model, 1), **arguments).images)


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_same_picture_as_the_stock_pipeline(folder: Path, tmp_path: Path, form: str) -> None:
    first = lora_weights(folder, 1, text=True)
    path = tmp_path / "first.safetensors"
    save_peft(path, first) if form == "peft" else save_kohya(path, first, alpha=2.0)
    second = save_peft(tmp_path / "second.safetensors", lora_weights(folder, 2, text=False))
    model = load(folder, [("", str(path)), ("other", str(second))])
    assert model.card.loras == ("first", "other")
    assert model.card.lora_digests == {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in (("first", path), ("other", second))
    }

    pipeline = stock(folder, "StableDiffusionPipeline", "DDIMScheduler")
    plain = stock_picture(pipeline, model)
    for name, file in (("first", path), ("other", second)):
        pipeline.load_lora_weights(file, adapter_name=name)
    for active in ([("first", 1.0)], [("first", 0.5), ("other", 0.75)], [("other", 1.0)]):
        pipeline.set_adapters([name for name, _ in active], [scale for _, scale in active])
        model.use_loras(active)
        expected = stock_picture(pipeline, model)
        assert psnr(picture(model), expected) >= LEAST_PSNR
        assert np.abs(expected - plain).mean() > 0.005  # the LoRA is not lost in both
    model.use_loras(())
    assert psnr(picture(model), plain) >= LEAST_PSNR


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_same_picture_as_the_stock_sdxl_pipeline(tmp_path: Path, form: str) -> None:
    folder = tiny.sdxl(tmp_path / "model")
    path, weights = tmp_path / "style.safetensors", lora_weights(folder, 1, text=True)
    save_peft(path, weights) if form == "peft" else save_kohya(path, weights, alpha=2.0)
    model = load(folder, [("", str(path))])
    model.use_loras([("style", 0.75)])
    pipeline = stock(folder, "StableDiffusionXLPipeline")
    plain = stock_picture(pipeline, model)
    pipeline.load_lora_weights(path, adapter_name="style")
    pipeline.set_adapters(["style"], [0.75])
    expected = stock_picture(pipeline, model)
    assert psnr(picture(model, "euler"), expected) >= LEAST_PSNR
    assert np.abs(expected - plain).mean() > 0.005


def test_no_lora_is_active_after_loading(folder: Path, tmp_path: Path) -> None:
    path = save_peft(tmp_path / "style.safetensors", lora_weights(folder, 1, text=True))
    np.testing.assert_array_equal(picture(load(folder, [("", str(path))])), picture(load(folder, [])))


def test_dropout_of_the_training_does_not_act(folder: Path, tmp_path: Path) -> None:
    weights = lora_weights(folder, 1, text=False)
    told = {"unet.r": RANK, "unet.lora_alpha": RANK, "unet.lora_dropout": 0.5}
    told["unet.target_modules"] = sorted(name.removeprefix("unet.") for name in weights)
    paths = save_peft(tmp_path / "plain.safetensors", weights), tmp_path / "dropout.safetensors"
    save_file(load_file(paths[0]), paths[1], metadata={"lora_adapter_metadata": json.dumps(told)})
    pictures = []
    for path in paths:
        model = load(folder, [("style", str(path))])
        model.use_loras([("style", 1.0)])
        pictures.append(picture(model))
    np.testing.assert_array_equal(*pictures)


def test_text_states_are_kept_apart_by_lora_set(folder: Path, tmp_path: Path) -> None:
    path = save_peft(tmp_path / "style.safetensors", lora_weights(folder, 1, text=True))
    model = load(folder, [("", str(path))])

    def state() -> torch.Tensor:
        (condition,) = model.encode([("a cat", "")], [1.0], "ddim", (64, 64))
        assert condition.positive is not None
        return condition.positive.hidden

    plain = state()
    model.use_loras([("style", 1.0)])
    assert not torch.equal(state(), plain)
    model.use_loras(())
    assert torch.equal(state(), plain)


def test_bundle_gives_the_lora_to_teacher_and_student(tmp_path: Path) -> None:
    folder = tiny.bundle(tmp_path / "model")
    path = save_peft(tmp_path / "style.safetensors", lora_weights(folder, 1, text=False))
    model = load(folder, [("", str(path))])
    for sampler in ("ddim", "lcm"):
        conditions = model.encode([("a cat", "")], [2.0], sampler, (64, 64))
        model.use_loras(())
        plain = draw(model, sampler, 2, conditions, noise_for(model, 1))
        model.use_loras([("style", 1.0)])
        assert not np.array_equal(draw(model, sampler, 2, conditions, noise_for(model, 1)), plain)


def test_faults(folder: Path, tmp_path: Path) -> None:
    good = save_peft(tmp_path / "good.safetensors", lora_weights(folder, 1, text=True))
    with pytest.raises(LoraError, match=r"LoRA file .*absent\.safetensors is missing"):
        load(folder, [("", str(tmp_path / "absent.safetensors"))])
    with pytest.raises(LoraError, match="two LoRA files are called 'good'"):
        load(folder, [("", str(good)), ("good", str(good))])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(good.read_bytes()[:-50])
    with pytest.raises(LoraError, match=r"broken\.safetensors") as caught:
        load(folder, [("", str(broken))])
    assert "\n" not in str(caught.value)
    with pytest.raises(LoraError, match="LoRA 'nosuch' is not loaded; loaded are: good"):
        load(folder, [("", str(good))]).use_loras([("nosuch", 1.0)])


@pytest.mark.parametrize(
    "key",
    ["unet.no_such_block.to_q", "transformer.blocks.0.to_q", "text_encoder_2.layers.0.self_attn.q_proj"],
)
def test_keys_that_fit_nothing_are_named(folder: Path, tmp_path: Path, key: str) -> None:
    path = save_peft(tmp_path / "stray.safetensors", {key: (torch.zeros(4, 16), torch.zeros(16, 4))})
    with pytest.raises(LoraError, match=key.removeprefix("unet.").replace(".", r"\.")):
        load(folder, [("", str(path))])


def test_layers_lost_in_conversion_are_noticed(folder: Path, tmp_path: Path) -> None:
    whole = lora_weights(folder, 1, text=True)
    path = save_kohya(tmp_path / "part.safetensors", {k: v for k, v in whole.items() if "out_proj" not in k}, alpha=2.0)
    with pytest.raises(
        LoraError, match=r"part\.safetensors has keys that fit nothing in this model, among text_encoder"
    ):
        load(folder, [("", str(path))])


def test_shapes_of_another_model(folder: Path, tmp_path: Path) -> None:
    weights = {name: (torch.zeros(4, 9), torch.zeros(9, 4)) for name in lora_weights(folder, 1, text=False)}
    path = save_peft(tmp_path / "wide.safetensors", weights)
    with pytest.raises(LoraError, match=r"wide\.safetensors does not fit this model"):
        load(folder, [("", str(path))])
