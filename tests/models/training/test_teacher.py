"""The teacher's training: its learning rate, its batches, and pictures of two sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.training.checkpoints import Checkpoints
from models.training.schedule import STEPS
from models.training.teacher import TeacherBatches, learning_rate, train_teacher
from tests.models.training import small
from tests.models.training.small import PRESET, FakeRing, Ticking


def test_the_learning_rate_rises_stays_and_falls() -> None:
    assert learning_rate(1e-3, 0, 10, 0.0) == pytest.approx(1e-4)
    assert learning_rate(1e-3, 50, 10, 0.3) == pytest.approx(1e-3)
    assert learning_rate(1e-3, 50, 10, 0.55) == pytest.approx(1e-3)
    assert 0 < learning_rate(1e-3, 50, 10, 1.0) < 1e-5


def test_timesteps_are_spread_over_the_batch() -> None:
    torch.manual_seed(0)
    batches = TeacherBatches(FakeRing(), 8, small.null(), small.ranks())
    for _ in range(5):
        latents, noise, timestep, states, alpha = batches.draw(refill_every=2)
        assert (timestep // (STEPS // 8)).tolist() == list(range(8))
        assert latents.shape == noise.shape
        assert len(states) == len(alpha) == 8


def test_some_captions_are_left_out() -> None:
    torch.manual_seed(0)
    batches = TeacherBatches(FakeRing(), 1000, small.null(), small.ranks())
    empty = (batches.draw(1)[3] == 0).flatten(1).all(1)
    assert 60 <= int(empty.sum()) <= 140


@pytest.mark.parametrize(("seconds", "large_steps"), [(3.0, 0), (1.6, 7)])
def test_later_steps_are_on_large_pictures_too(tmp_path: Path, seconds: float, large_steps: int) -> None:
    """One in three steps after 60% of the time; the clock is read after 20 steps, one second in, and after 40."""
    preset, ranks = replace(PRESET, refill_every=1), small.ranks(Ticking())
    usual, large = FakeRing(), FakeRing(2 * PRESET.latent)
    figures = train_teacher(preset, usual, large, small.null(), None, ranks, Checkpoints(tmp_path, ranks), seconds)
    assert figures["steps"] == 40
    assert usual.refills == 40 - large_steps
    assert large.refills == 1 + large_steps  # the first only compiles
