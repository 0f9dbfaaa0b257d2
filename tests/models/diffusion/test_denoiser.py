"""The denoiser's contract: rows are independent, guidance costs only the rows that have it, parameterisations agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.diffusion.denoiser import CACHED_BATCHES, PREDICTIONS, ConsistencyDenoiser, TextDenoiser, guidance_embedding
from models.diffusion.loaded import LoadedModel
from models.diffusion.loading import load_model
from models.diffusion.model import Condition, TextStates
from models.errors import ModelError
from tests import tiny

SIZE = (64, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tiny.bundle(tmp_path_factory.mktemp("bundle") / "model")
    return load_model(str(folder), dtype="float32", device="cpu", cache_dir=folder)


@pytest.fixture
def evaluations(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every evaluation of the teacher's network."""
    rows: list[int] = []
    unet = model.denoiser("ddim")._unet
    forward = unet.forward

    def counted(sample: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        rows.append(len(sample))
        return forward(sample, *arguments, **keywords)

    monkeypatch.setattr(unet, "forward", counted)
    return rows


def inputs(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 8, 8, generator=generator)
    return x, torch.linspace(900, 50, rows), torch.linspace(0.1, 0.99, rows)


@pytest.mark.parametrize(
    ("scales", "cost"), [([1.0, 1.0], 2), ([3.0, 3.0], 4), ([3.0, 1.0, 5.0, 1.0], 6), ([0.0, 7.0], 3)]
)
def test_rows_equal_their_solo_runs_and_cost_what_they_say(
    model: LoadedModel, evaluations: list[int], scales: list[float], cost: int
) -> None:
    prompts = [("a red apple", "blue"), ("two cats", ""), ("a fox", "dog"), ("an apple on green", "")][: len(scales)]
    conditions = model.encode(prompts, scales, "ddim", SIZE)
    assert sum(condition.evaluations for condition in conditions) == cost
    x, t, alpha = inputs(len(scales))
    together = model.denoiser("ddim")(x, t, alpha, conditions)
    assert evaluations == [cost]
    assert together.dtype == torch.float32
    assert together.is_contiguous()
    for row, condition in enumerate(conditions):
        one = slice(row, row + 1)
        alone = model.denoiser("ddim")(x[one], t[one], alpha[one], [condition])
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 13), (8, 33), (16, 8)])
def test_any_size_in_latent_cells(model: LoadedModel, shape: tuple[int, int]) -> None:
    """What the card allows: multiples of 8 pixels, also those that the UNet cannot halve evenly."""
    assert model.card.size_multiple == model.card.scale == 8
    conditions = model.encode([("a cat", "")], [3.0], "ddim", (8 * shape[1], 8 * shape[0]))
    x = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(0))
    denoised = model.denoiser("ddim")(x, torch.tensor([500.0]), torch.tensor([0.5]), conditions)
    assert denoised.isfinite().all()
    assert model.decode(denoised).shape == (1, 8 * shape[0], 8 * shape[1], 3)


def test_guidance_is_the_stated_combination(model: LoadedModel) -> None:
    (guided,) = model.encode([("a red apple", "blue")], [4.0], "ddim", SIZE)
    network, (x, t, alpha) = model.denoiser("ddim"), inputs(1)
    positive = network(x, t, alpha, [replace(guided, negative=None)])
    negative = network(x, t, alpha, [replace(guided, positive=guided.negative, negative=None)])
    expected = negative + 4.0 * (positive - negative)  # v-prediction is linear, so guiding x0 is guiding v
    torch.testing.assert_close(network(x, t, alpha, [guided]), expected, rtol=1e-4, atol=1e-5)


def test_embedded_guidance_needs_no_negative_and_acts(model: LoadedModel) -> None:
    weak, strong = model.encode([("a cat", "dog")] * 2, [1.0, 8.0], "lcm", SIZE)
    assert weak.negative is None
    assert strong.negative is None
    x, t, alpha = inputs(1)
    assert not torch.allclose(model.denoiser("lcm")(x, t, alpha, [weak]), model.denoiser("lcm")(x, t, alpha, [strong]))


def test_batches_are_stacked_once(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    network = model.denoiser("ddim")
    assert isinstance(network, TextDenoiser)
    stacked: list[int] = []
    stack = network._stack

    def counted(conditions: tuple[Condition, ...]) -> Any:
        stacked.append(len(conditions))
        return stack(conditions)

    monkeypatch.setattr(network, "_stack", counted)
    conditions = model.encode([("a cat", ""), ("a dog", "")], [3.0, 1.0], "ddim", SIZE)
    x, t, alpha = inputs(2)
    for _ in range(3):
        network(x, t, alpha, conditions)
    assert stacked == [2]
    network(x[:1], t[:1], alpha[:1], conditions[:1])
    network(x, t, alpha, conditions)
    assert stacked == [2, 1]
    assert len(network._batches) <= CACHED_BATCHES


@pytest.mark.parametrize("sampler", ["ddim", "lcm"])
def test_a_step_does_not_walk_over_the_modules(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """As asking diffusers for a network's dtype or device does: 3 ms for SDXL's UNet."""

    def walked(*_: Any, **__: Any) -> Any:
        raise AssertionError

    network = model.denoiser(sampler)
    for name in ("modules", "named_modules", "parameters", "named_parameters"):
        monkeypatch.setattr(network._unet, name, walked)
    network(*inputs(1), model.encode([("a quick fox", "")], [3.0], sampler, SIZE))


def test_v_prediction_at_zero_signal_is_finite(model: LoadedModel) -> None:
    conditions = model.encode([("a cat", "")], [3.0], "ddim", SIZE)
    x, _, _ = inputs(1)
    denoised = model.denoiser("ddim")(x, torch.tensor([999.0]), torch.tensor([0.0]), conditions)
    assert denoised.isfinite().all()


@given(alpha=st.floats(0.01, 0.999), seed=st.integers(0, 2**31))
@settings(max_examples=30)
def test_parameterisations_recover_x0(alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 4, generator=generator)
    sigma = (1 - alpha**2) ** 0.5
    outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}
    assert outputs.keys() == PREDICTIONS.keys()
    for name, output in outputs.items():
        got = PREDICTIONS[name](output, alpha * x0 + sigma * noise, torch.tensor(alpha), torch.tensor(sigma))
        torch.testing.assert_close(got, x0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [16, 17, 256])
def test_guidance_embedding_is_diffusers(width: int) -> None:
    from diffusers import LatentConsistencyModelPipeline

    scales = torch.tensor([1.0, 2.0, 8.5])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=width)
    torch.testing.assert_close(guidance_embedding(scales, width), expected, rtol=0, atol=0)


class Scripted(torch.nn.Module):
    """Stands in for a UNet2DModel: remembers its input, answers zeros."""

    dtype, device = torch.float32, torch.device("cpu")

    class config:  # noqa: N801
        num_class_embeds = None

    def forward(self, sample: torch.Tensor, t: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        self.sample = sample
        return (torch.zeros_like(sample),)


@given(log_sigma=st.floats(-6.2, 4.38))
@settings(max_examples=30)
def test_consistency_scalings(log_sigma: float) -> None:
    """Karras et al. 2022, table 1 (c_in) and Song et al. 2023, appendix C (c_skip), down to sigma_min in float32."""
    network = Scripted()
    denoiser = ConsistencyDenoiser(network, sigma_min=0.002, sigma_data=0.5, clip_denoised=False)
    sigma = torch.tensor(log_sigma, dtype=torch.float64).exp()
    x_ve = 1 + sigma * torch.linspace(-1, 1, 48, dtype=torch.float64).view(1, 3, 4, 4)
    alpha = 1 / (1 + sigma**2).sqrt()
    t = torch.tensor([250 * log_sigma], dtype=torch.float32)
    denoised = denoiser((x_ve * alpha).float(), t, alpha.float().view(1), [Condition(None, None, 1.0)])
    torch.testing.assert_close(network.sample.double(), x_ve / (sigma**2 + 0.25).sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(denoised.double(), x_ve * 0.25 / ((sigma - 0.002) ** 2 + 0.25), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", [None, -1, 10])
def test_class_labels_are_checked(tmp_path: Path, label: int | None) -> None:
    folder = tiny.consistency(tmp_path / "model", num_classes=10)
    model = load_model(str(folder), dtype="float32", device="cpu", cache_dir=folder)
    assert model.card.num_classes == 10
    x, t, alpha = torch.zeros(1, 3, 16, 16), torch.tensor([1000.0]), torch.tensor([0.01])
    with pytest.raises(ModelError, match=f"class_label {label} is not allowed; this model draws classes 0 to 9"):
        model.denoiser("consistency")(x, t, alpha, [Condition(None, None, 1.0, class_label=label)])


def test_unknown_prediction() -> None:
    with pytest.raises(ModelError, match="prediction_type 'flow' is not served"):
        TextDenoiser(None, "flow")


def test_text_model_needs_text(model: LoadedModel) -> None:
    x, t, alpha = inputs(1)
    with pytest.raises(ModelError, match="without text"):
        model.denoiser("ddim")(x, t, alpha, [Condition(None, TextStates(torch.zeros(1)), 1.0)])
