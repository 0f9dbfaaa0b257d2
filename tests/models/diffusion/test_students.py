"""Students: as the papers and the stock pipelines have them, each in its place, or one line that says what is wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.diffusion.denoiser import LatentConsistencyDenoiser
from models.diffusion.folder import quiet_libraries
from models.diffusion.loaded import LoadedModel
from models.diffusion.loading import load_model
from models.errors import ModelError
from tests import tiny
from tests.models.diffusion.test_equivalence import LEAST_PSNR, denoise, draw, noise_for, psnr, stock

PROMPT = "a red apple"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


def load(folder: Path, **arguments: Any) -> LoadedModel:
    return load_model(str(folder), **({"dtype": "float32", "device": "cpu", "cache_dir": folder / "cache"} | arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bundle_with_loras(tmp_path_factory.mktemp("bundle") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    with quiet_libraries():
        return load(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _no_loras(model: LoadedModel) -> Iterator[None]:
    yield
    model.use_loras(())


def multistep(folder: Path, lora: str, sigmas: list[float], states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Song et al. 2023, algorithm 1, as written there: in variance-exploding space, on a UNet of fused weights."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    weights, adapters = unet.state_dict(), load_file(folder / "lora" / f"{lora}.safetensors")
    for key, down in adapters.items():
        if key.endswith(".lora_A.weight"):
            up = adapters[key.replace("lora_A", "lora_B")]
            weight = weights[key.removeprefix("unet.").replace("lora_A.", "")]
            weight += (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    alphas = DDIMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod.double().numpy()[:-1]
    levels = 0.5 * np.log((1 - alphas) / alphas)  # log sigma of timesteps 0 to 998
    epsilon, generator = tiny.SIGMA_MIN, torch.Generator().manual_seed(9)
    x = sigmas[0] * noise.double()
    for index, sigma in enumerate(sigmas):
        if index:
            z = torch.randn(noise.shape, generator=generator).double()
            x = x + math.sqrt(sigma**2 - epsilon**2) * z
        t = torch.tensor([np.interp(math.log(sigma), levels, np.arange(len(levels)))] * len(x))
        scaled = x / math.sqrt(1 + sigma**2)
        with torch.no_grad():
            v = unet(scaled.float(), t.float(), states).sample.double()
        c_skip = 1 / ((sigma - epsilon) ** 2 + 1)
        c_out = (sigma - epsilon) / math.sqrt(sigma**2 + 1)
        x = c_skip * x - c_out * v
    return x


def karras(steps: int) -> list[float]:
    ends = 80.0 ** (1 / 7), tiny.SIGMA_MIN ** (1 / 7)
    return [(ends[0] + i / steps * (ends[1] - ends[0])) ** 7 for i in range(steps)]


@pytest.mark.parametrize(
    ("name", "lora", "sigmas"),
    [
        ("consistency", (), [80.0]),
        ("consistency", (), [80.0, 1.5]),
        ("consistency", (), karras(3)),
        ("tuned", (("tuned", 1.0),), karras(2)),
    ],
)
def test_consistency_is_the_algorithm_of_the_paper(
    folder: Path, model: LoadedModel, name: str, lora: tuple[tuple[str, float], ...], sigmas: list[float]
) -> None:
    model.use_loras(lora)
    conditions = model.encode([(PROMPT, "dull"), ("two foxes", "")], [3.0, 3.0], "consistency", (64, 64))
    assert all(condition.evaluations == 1 for condition in conditions)
    noise = noise_for(model, 2)
    ours = denoise(model, "consistency", len(sigmas), conditions, noise, seed=9)
    states = torch.stack([condition.positive.hidden for condition in conditions if condition.positive])
    expected = multistep(folder, name, sigmas, states, noise)
    assert (ours - expected).norm() <= 1e-4 * expected.norm()


def test_the_consistency_function_is_the_identity_at_sigma_min(model: LoadedModel) -> None:
    network = model.denoiser("consistency")
    assert isinstance(network, LatentConsistencyDenoiser)
    conditions = model.encode([(PROMPT, "")], [3.0], "consistency", (64, 64))
    x, alpha = noise_for(model, 1), 1 / math.hypot(1, tiny.SIGMA_MIN)
    denoised = network(x, torch.tensor([0.0]), torch.tensor([alpha]), conditions)
    torch.testing.assert_close(denoised, x / alpha, rtol=1e-5, atol=1e-5)


def test_without_a_boundary_it_is_the_v_prediction(model: LoadedModel) -> None:
    network = LatentConsistencyDenoiser(model.denoiser("ddim")._unet, sigma_min=0.0)  # type: ignore[union-attr]
    conditions = model.encode([(PROMPT, "")], [1.0], "ddim", (64, 64))
    inputs = noise_for(model, 1), torch.tensor([700.0]), torch.tensor([0.2])
    expected = model.denoiser("ddim")(*inputs, conditions)
    torch.testing.assert_close(network(*inputs, conditions), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [True, False])
def test_an_lcm_lora_draws_on_the_teacher_as_the_stock_pipeline_does(folder: Path, tmp_path: Path, own: bool) -> None:
    """The one that comes with a bundle, and a user's own on a plain Stable Diffusion."""
    name = "lcm-lora" if own else "fast"
    file = folder / "lora" / "lcm.safetensors"
    if own:
        place, model = folder, load(folder)
    else:
        place = tiny.sd(tmp_path / "model")
        model = load(place, loras=[(name, str(file))])
        assert model.card.samplers["lcm"].needs_lora
    pipeline = stock(place, "StableDiffusionPipeline", "LCMScheduler")
    arguments = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np"}

    def expected() -> np.ndarray:
        generator = torch.Generator().manual_seed(2)
        return np.asarray(pipeline(PROMPT, latents=noise_for(model, 1), generator=generator, **arguments).images)

    plain = expected()
    pipeline.load_lora_weights(file, adapter_name=name)
    pipeline.set_adapters([name], [0.75])
    model.use_loras([(name, 0.75)])
    conditions = model.encode([(PROMPT, "")], [2.5 if own else 1.0], "lcm", model.card.default_size)
    assert conditions[0].evaluations == 1
    assert psnr(draw(model, "lcm", 4, conditions, noise_for(model, 1), seed=2), expected()) >= LEAST_PSNR
    assert np.abs(expected() - plain).mean() > 0.005


def test_guidance_above_one_with_a_users_lcm_lora_takes_a_negative_branch(folder: Path, tmp_path: Path) -> None:
    loras = [("fast", str(folder / "lora" / "lcm.safetensors"))]
    model = load(tiny.sd(tmp_path / "model"), loras=loras)
    assert model.encode([(PROMPT, "dull")], [1.5], "lcm", (64, 64))[0].evaluations == 2


def test_the_card_names_the_students_and_their_limits(model: LoadedModel) -> None:
    card = model.card
    consistency = card.samplers["consistency"]
    assert (consistency.guidance_scale, consistency.fixed_guidance, consistency.max_steps) == (3.0, True, 50)
    assert (card.samplers["lcm"].max_steps, card.samplers["lcm"].fixed_guidance) == (50, False)
    assert card.loras == ("lcm-lora", "tuned")
    assert {name: lora.sampler for name, lora in card.student_loras.items()} == {
        "lcm-lora": "lcm",
        "tuned": "consistency",
    }
    assert card.defaults("lcm", (("lcm-lora", 1.0),)).guidance_scale == 2.5
    assert card.defaults("ddim", (("lcm-lora", 1.0),)) == card.samplers["ddim"]


def test_each_sampler_and_student_lora_has_its_network(model: LoadedModel) -> None:
    lcm_lora, style = (("lcm-lora", 1.0),), (("style", 1.0),)
    assert model.denoiser("lcm", style) is model.denoiser("lcm")
    networks = [model.denoiser(name) for name in ("ddim", "lcm", "consistency")]
    networks += [model.denoiser("lcm", lcm_lora), model.denoiser("consistency", (("tuned", 1.0),))]
    assert len({id(network) for network in networks}) == 5
    unets = [network._unet for network in networks]  # type: ignore[union-attr]
    assert unets[0] is unets[3] is unets[4]
    assert len({id(unet) for unet in unets}) == 3


def test_a_style_acts_on_every_student(copy: Path, tmp_path: Path) -> None:
    style = tiny.lora(tmp_path / "style.safetensors", copy, seed=7)
    model = load(copy, loras=[("style", str(style)), ("lcm-lora", "lcm-lora")])
    assert sorted(model.card.loras) == ["lcm-lora", "style", "tuned"]
    for sampler in ("ddim", "lcm", "consistency"):
        model.use_loras(())
        conditions = model.encode([(PROMPT, "")], [3.0], sampler, (64, 64))
        plain = draw(model, sampler, 2, conditions, noise_for(model, 1))
        model.use_loras([("style", 1.0)])
        assert not np.array_equal(draw(model, sampler, 2, conditions, noise_for(model, 1)), plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fused_weights_are_rounded_once(folder: Path, model: LoadedModel, dtype: str) -> None:
    exact = model.denoiser("consistency")._unet.state_dict()  # type: ignore[union-attr]
    rounded = load(folder, dtype=dtype).denoiser("consistency")._unet.state_dict()  # type: ignore[union-attr]
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[key].to(getattr(torch, dtype)), value) for key, value in rounded.items())


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def swap(folder: Path, source: str, target: str) -> None:
    shutil.rmtree(folder / target)
    shutil.copytree(folder / source, folder / target)


def edit_lora(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "lora" / "consistency.safetensors"
    save_file(change(load_file(path)), path)


def edit_student(folder: Path, **changes: Any) -> None:
    edit(folder / "manifest.json", lambda values: values["students"]["consistency"].update(changes))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "student as teacher": (
        lambda f: swap(f, "unet_lcm", "unet"),
        r"unet/config\.json: time_cond_proj_dim is 16: this is an LCM student where the teacher is expected",
    ),
    "teacher as student": (
        lambda f: swap(f, "unet", "unet_lcm"),
        r"unet_lcm/config\.json: time_cond_proj_dim is not set: this is a teacher where an LCM student is expected",
    ),
    "teacher as student alone": (
        lambda f: edit(f / "model_index.json", lambda v: v.update(_class_name="LatentConsistencyModelPipeline")),
        r"unet/config\.json: time_cond_proj_dim is not set: this is a teacher where an LCM student is expected",
    ),
    "no LoRA file": (
        lambda f: (f / "lora" / "consistency.safetensors").unlink(),
        r"LoRA file .*lora/consistency\.safetensors is missing",
    ),
    "LoRA of another shape": (
        lambda f: edit_lora(
            f, lambda s: {k: torch.zeros(v.shape[0], v.shape[1] + 1, *v.shape[2:]) for k, v in s.items()}
        ),
        r"LoRA file .*lora/consistency\.safetensors does not fit this model",
    ),
    "LoRA of another network": (
        lambda f: edit_lora(f, lambda s: {k.replace("unet.", "transformer."): v for k, v in s.items()}),
        r"LoRA file .*lora/consistency\.safetensors has keys that fit nothing in this model",
    ),
    "LoRA of layers that are not there": (
        lambda f: edit_lora(f, lambda s: {k.replace("mid_block", "no_block"): v for k, v in s.items()}),
        r"LoRA file .*lora/consistency\.safetensors has keys that fit nothing in this model",
    ),
    "no sigma_max": (
        lambda f: edit(f / "manifest.json", lambda v: v["students"]["consistency"].pop("sigma_max")),
        r"manifest\.json: students: consistency: sigma_max is missing",
    ),
    "other data": (lambda f: edit_student(f, sigma_data=0.5), r"manifest\.json: .*sigma_data: 0\.5; allowed: 1"),
    "noise that the schedule has not": (
        lambda f: edit_student(f, sigma_min=0.002),
        r"manifest\.json: students: consistency: sigma_min: 0\.002 .*allowed: from 0\.0291\d+ to",
    ),
    "time points of another number": (
        lambda f: edit_student(f, sigmas={"3": [80.0, 1.0]}),
        r"manifest\.json: students: consistency: sigmas for 3 steps: .*strictly decreasing",
    ),
    "a student of no sampler": (
        lambda f: edit(f / "manifest.json", lambda v: v["students"].update(ddim={"lora": "x"})),
        r"manifest\.json: students: ddim: sampler: 'ddim'; allowed: consistency",
    ),
    "students that are a list": (
        lambda f: edit(f / "manifest.json", lambda v: v.update(students=[1])),
        r"manifest\.json: students: \[1\] is not an object",
    ),
    "another prediction": (
        lambda f: [
            edit(f / scheduler / "scheduler_config.json", lambda v: v.update(prediction_type="sample"))
            for scheduler in ("scheduler", "scheduler_lcm")
        ],
        r"scheduler_config\.json: prediction_type is 'sample'; with the consistency model .* it must be v_prediction",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_clear_line(copy: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(ModelError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_a_student_alone_is_served_from_a_pipeline_of_its_own(folder: Path, tmp_path: Path) -> None:
    assert set(load(tiny.lcm(tmp_path / "lcm")).card.samplers) == {"lcm"}


def test_a_manifest_without_students_is_one_of_a_plain_bundle(copy: Path) -> None:
    edit(copy / "manifest.json", lambda values: (values.pop("students"), values.pop("loras")))
    card = load(copy).card
    assert "consistency" not in card.samplers
    assert card.loras == ()
