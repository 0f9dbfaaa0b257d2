"""LoRAs as they are trained and as others load them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from models.diffusion.folder import quiet_libraries
from models.diffusion.loading import load_model
from models.diffusion.lora import LoraSet
from models.training.flat import FlatOptimizer
from models.training.lora import AdaptedConv2d, AdaptedLinear, Adapters, merge, save_lora
from tests import tiny
from tests.models.diffusion.test_equivalence import LEAST_PSNR, draw, noise_for, psnr, stock
from tests.models.training.small import LENGTH, PRESET, WIDTH, ranks, taught, teacher, weights

RANK = 4


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, PRESET.latent, PRESET.latent, generator=generator)
    return x, torch.tensor([2.0, 400.5, 990.0]), torch.randn(3, LENGTH, WIDTH, generator=generator)


@torch.no_grad()
def output(unet: UNet2DConditionModel) -> torch.Tensor:
    return unet(*inputs(), return_dict=False)[0]


def randomised() -> tuple[UNet2DConditionModel, Adapters]:
    """An adapted teacher whose adapters all act."""
    unet = teacher().requires_grad_(False)
    adapters = Adapters(unet, RANK)
    for layer in adapters.layers:
        nn.init.normal_(layer.up, std=0.05)
    return unet, adapters


@pytest.mark.parametrize("stride", [1, 2])
def test_an_adapted_convolution_is_two_convolutions(stride: int) -> None:
    layer = nn.Conv2d(6, 10, 3, stride=stride, padding=1)
    adapted = AdaptedConv2d(layer, RANK)
    nn.init.normal_(adapted.up)
    down, up = adapted.pair(adapted.down, adapted.up)
    x = torch.randn(2, 6, 8, 8)
    low = nn.functional.conv2d(x, down, stride=stride, padding=1)
    torch.testing.assert_close(adapted(x), layer(x) + nn.functional.conv2d(low, up), rtol=1e-4, atol=1e-5)


def test_an_adapted_linear_layer_is_two_layers() -> None:
    layer = nn.Linear(6, 10)
    adapted = AdaptedLinear(layer.weight, layer.bias, RANK)
    nn.init.normal_(adapted.up)
    x = torch.randn(5, 6)
    torch.testing.assert_close(adapted(x), layer(x) + x @ adapted.down.T @ adapted.up.T, rtol=1e-4, atol=1e-5)


def test_new_adapters_change_nothing_and_cover_every_layer() -> None:
    unet = teacher()
    before, layers = output(unet), [m for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    adapters = Adapters(unet, RANK)
    torch.testing.assert_close(output(unet), before, rtol=1e-5, atol=1e-6)
    assert len(adapters.layers) == len(layers)
    assert not [m for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sum(p.numel() for p in adapters.parameters()) < 0.5 * sum(layer.weight.numel() for layer in layers)


def test_the_optimiser_trains_adapters_alone() -> None:
    unet = teacher().requires_grad_(False)
    adapters = Adapters(unet, RANK)
    frozen = {name: value.clone() for name, value in unet.named_buffers()}
    optimizer = FlatOptimizer(adapters, ranks(), average=0.9)
    losses = []
    for _ in range(20):
        loss = unet(*inputs(), return_dict=False)[0].square().mean()
        loss.backward()
        optimizer.step(5e-3)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, value in unet.named_buffers():
        assert torch.equal(value, frozen[name])
    assert taught(adapters.weights([p.detach() for p in adapters.parameters()]))


def test_merged_weights_draw_the_same() -> None:
    unet, adapters = randomised()
    plain = teacher()
    before = output(plain)
    plain.load_state_dict(merge(weights(plain), adapters.weights([p.detach() for p in adapters.parameters()])))
    torch.testing.assert_close(output(plain), output(unet), rtol=1e-3, atol=1e-4)
    assert float((output(plain) - before).abs().mean()) > 0.01


def exported(path: Path) -> torch.Tensor:
    """Writes a LoRA; returns what the merged network answers."""
    unet, adapters = randomised()
    save_lora(adapters.weights([p.detach() for p in adapters.parameters()]), path)
    assert all(value.dtype == torch.float16 for value in load_file(path).values())
    return output(unet)


def test_stock_pipelines_load_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    expected = exported(path)
    pipeline = StableDiffusionPipeline(
        unet=teacher(),
        vae=AutoencoderKL(),
        text_encoder=None,
        tokenizer=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(path)
    got = output(pipeline.unet)
    assert float((got - expected).norm() / expected.norm()) < 2e-3


def test_the_service_loads_the_file(tmp_path: Path) -> None:
    path, unet = tmp_path / "lora.safetensors", teacher()
    expected, before = exported(path), output(unet)
    loras = LoraSet([unet])
    loras.load("lora", path)
    torch.testing.assert_close(output(unet), before)
    loras.use([("lora", 1.0)])
    got = output(unet)
    assert float((got - expected).norm() / expected.norm()) < 2e-3


def test_the_service_and_the_stock_pipeline_draw_the_same_with_the_file(tmp_path: Path) -> None:
    """On a Stable Diffusion folder, by the loader that `--lora` goes through."""
    folder, path, prompt = tiny.sd(tmp_path / "model"), tmp_path / "fast.safetensors", "a red fox"
    adapters = Adapters(UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False), RANK)
    for layer in adapters.layers:
        nn.init.normal_(layer.up, std=0.2)
    save_lora(adapters.weights([p.detach() for p in adapters.parameters()]), path)
    with quiet_libraries():
        loras = [("", str(path))]
        model = load_model(str(folder), dtype="float32", device="cpu", loras=loras, cache_dir=tmp_path)
        pipeline = stock(folder, "StableDiffusionPipeline", "LCMScheduler")

        def expected() -> np.ndarray:
            arguments = {"guidance_scale": 1.0, "num_inference_steps": 4, "output_type": "np"}
            generator = torch.Generator().manual_seed(2)
            return np.asarray(pipeline(prompt, latents=noise_for(model, 1), generator=generator, **arguments).images)

        plain = expected()
        pipeline.load_lora_weights(path)
        model.use_loras([("fast", 1.0)])
        conditions = model.encode([(prompt, "")], [1.0], "lcm", model.card.default_size)
        ours = draw(model, "lcm", 4, conditions, noise_for(model, 1), seed=2)
        assert psnr(ours, expected()) >= LEAST_PSNR
    assert np.abs(expected() - plain).mean() > 0.005  # the LoRA is not lost in both
