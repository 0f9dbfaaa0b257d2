"""Consistency lessons against the papers' formulas, and the training in miniature."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.training.checkpoints import Checkpoints
from models.training.consistency import Distillation, Tuning, train_consistency, tune_consistency
from models.training.forms import edm_form
from models.training.sampling import FixedBatch, predictor
from models.training.schedule import NoiseLevels, per_row
from models.training.students import by_picture
from tests.models.training.small import CPU, PRESET, FakeRing, Ticking, null, ranks, taught, teacher, weights

BATCH = 64
LEVELS = NoiseLevels(CPU)
LOW = LEVELS.low
STAGES = {"consistency": train_consistency, "consistency-training": tune_consistency}


def predict(seed: int) -> FixedBatch:
    return predictor(teacher(seed).requires_grad_(False), "inference", BATCH, ranks())


def network(velocity: FixedBatch, x: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """F of Karras et al. 2022, of a v-network."""
    return -velocity(x / (per_row(sigma) ** 2 + 1).sqrt(), LEVELS.timestep(sigma), states)


def consistency(velocity: FixedBatch, x: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Song et al. 2023, appendix C, sigma_data = 1."""
    s = per_row(sigma)
    c_skip, c_out = 1 / ((s - LOW) ** 2 + 1), (s - LOW) / (s**2 + 1).sqrt()
    return c_skip * x + c_out * network(velocity, x, sigma, states)


def sigmas_of(take: torch.Tensor) -> torch.Tensor:
    """sigma from c_out: (sigma - low) = take sqrt(sigma^2 + 1), solved for sigma."""
    a, b, c = take.double() ** 2 - 1, torch.full_like(take.double(), 2 * LOW), take.double() ** 2 - LOW**2
    return ((-b - (b**2 - 4 * a * c).sqrt()) / (2 * a)).float()


def test_distillation_targets_are_algorithm_2() -> None:
    """One Euler step of the guided teacher from sigma_far to sigma_near, then the averaged student."""
    guide, average = predict(1), predict(2)
    torch.manual_seed(0)
    lessons = Distillation(PRESET, FakeRing(), BATCH, null(), guide, average, ranks())
    x, timestep, states, target, weight, *form = lessons.draw(0.0)
    far = LEVELS.sigma(timestep)
    grid = torch.linspace(80 ** (1 / 7), LOW ** (1 / 7), 40) ** 7
    place = (grid[None].log() - far[:, None].log()).abs().argmin(1)
    torch.testing.assert_close(grid[place], far, rtol=1e-3, atol=0)
    assert (place == 0).float().mean() > 0.05  # where every picture starts
    assert len(place.unique()) > 15
    far, near = grid[place], grid[place + 1]

    def denoiser(text: torch.Tensor) -> torch.Tensor:
        s = per_row(far)
        return x / (s**2 + 1) + s / (s**2 + 1).sqrt() * network(guide, x, far, text)

    with_text, without = denoiser(states), denoiser(null().expand_as(states))
    denoised = without + PRESET.distilled_guidance * (with_text - without)
    slope = (x - denoised) / per_row(far)  # dx / dsigma, Karras et al. 2022, equation 1
    nearer = x + per_row(near - far) * slope
    torch.testing.assert_close(target, consistency(average, nearer, near, states), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.stack(form), torch.stack([*edm_form(far, LOW)]), rtol=1e-3, atol=1e-5)
    assert torch.equal(weight, torch.ones(BATCH))


@pytest.mark.parametrize(("progress", "levels"), [(0.0, 10), (0.19, 10), (0.5, 40), (0.99, 160), (1.0, 160)])
def test_tuning_targets_are_algorithm_3(progress: float, levels: int) -> None:
    """The student itself, at the same data and noise, one level nearer."""
    itself, ring = predict(1), FakeRing(examples=1)
    torch.manual_seed(0)
    x, timestep, states, target, weight, *form = Tuning(ring, BATCH, itself, ranks()).draw(progress)
    grid = torch.linspace(80 ** (1 / 7), LOW ** (1 / 7), levels) ** 7
    far = LEVELS.sigma(timestep)
    place = (grid[None].log() - far[:, None].log()).abs().argmin(1)
    torch.testing.assert_close(grid[place], far, rtol=1e-3, atol=0)
    far, near = grid[place], grid[place + 1]
    noise = (x - ring.latents) / per_row(far)
    nearer = ring.latents + per_row(near) * noise
    torch.testing.assert_close(target, consistency(itself, nearer, near, states), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weight, 1 / (far - near), rtol=1e-2, atol=0)
    torch.testing.assert_close(torch.stack(form), torch.stack([*edm_form(far, LOW)]), rtol=1e-3, atol=1e-5)


def test_tuning_draws_levels_log_normally() -> None:
    torch.manual_seed(0)
    lessons = Tuning(FakeRing(), 4096, lambda x, *_: x, ranks())  # type: ignore[arg-type]
    logs = LEVELS.sigma(lessons.draw(1.0)[1]).log()
    # N(-1.1 + ln 2, 2), cut off at the ends of the grid: at -3.5 and 4.4.
    normal = torch.distributions.Normal(-1.1 + 0.6931, 2.0)
    for sigma in (0.1, 1.0, 10.0):
        low, high, here = (normal.cdf(torch.tensor(s).log()) for s in (LOW, 80.0, sigma))
        assert float((logs < torch.tensor(sigma).log()).float().mean()) == pytest.approx(
            float((here - low) / (high - low)), abs=0.04
        )


def test_distance_is_pseudo_huber() -> None:
    """sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(n), in units of sqrt(n)."""
    difference = torch.randn(3, 4, 8, 8) * torch.tensor([1.0, 1e-3, 0.0])[:, None, None, None]
    count = difference[0].numel()
    c = 0.00054 * count**0.5
    expected = ((difference.flatten(1).norm(dim=1) ** 2 + c**2).sqrt() - c) / count**0.5
    torch.testing.assert_close(by_picture(difference), expected, rtol=1e-4, atol=1e-6)


def train(name: str, folder: Path, seconds: float, clock: Ticking | None = None) -> dict[str, Any]:
    there = ranks(clock)
    start = weights(teacher())
    return STAGES[name](PRESET, FakeRing(), null(), start, there, Checkpoints(folder, there), seconds)


@pytest.mark.parametrize("name", STAGES)
def test_training_ends_in_a_lora(name: str, tmp_path: Path) -> None:
    figures = train(name, tmp_path, 2)
    assert figures["steps"] >= 20
    done = Checkpoints(tmp_path, ranks()).finished(name)
    assert done is not None
    lora = done["weights"]
    assert {value.shape[0] for key, value in lora.items() if "lora_A" in key} == {PRESET.consistency_rank}
    assert {value.dtype for value in lora.values()} == {torch.float32}
    assert taught(lora)


def test_an_interrupted_training_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InterruptedError):
        train("consistency", tmp_path, 400, Ticking(step=100, readings=6))
    state = Checkpoints(tmp_path, ranks()).load("consistency")
    assert state is not None
    assert not state["finished"]
    figures = train("consistency", tmp_path, 400, Ticking(step=100))
    assert f"consistency: resumed at step {state['optimizer']['iterations']}" in capsys.readouterr().out
    assert figures["steps"] > state["optimizer"]["iterations"] > 0
