"""Grounds: colours where they are said to be, and pictures that cannot be taken for one another."""

import pytest
import torch
import torch.nn.functional as F

from models.training.grounds import COLOURED, GROUNDS, Grounds

CPU = torch.device("cpu")
RED, BLUE = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.9])


def ground(name: str, total: int = 16, side: int = 64) -> torch.Tensor:
    kind = torch.full((total,), GROUNDS.index(name))
    key = torch.arange(total) * 3.1
    return Grounds(CPU).draw(kind, RED.expand(total, 3), BLUE.expand(total, 3), key, side)


def test_a_gradient_runs_from_top_to_bottom() -> None:
    picture = ground("gradient")
    torch.testing.assert_close(picture[0, :, 0, 0], RED, atol=0.02, rtol=0)
    torch.testing.assert_close(picture[0, :, -1, -1], BLUE, atol=0.02, rtol=0)


@pytest.mark.parametrize(("name", "least"), [("stripes", 0.4), ("dots", 0.12)])
def test_marks_have_their_colour_and_leave_the_base_its_own(name: str, least: float) -> None:
    picture = ground(name, side=128)
    marks = ((picture - BLUE[:, None, None]).abs().amax(1) < 0.05).float().mean((1, 2))
    base = ((picture - RED[:, None, None]).abs().amax(1) < 0.05).float().mean((1, 2))
    assert marks.min() > least
    assert base.min() > 0.3


@pytest.mark.parametrize("name", GROUNDS)
def test_the_same_key_is_the_same_ground_at_every_size(name: str) -> None:
    small, large = ground(name, side=64), F.avg_pool2d(ground(name, side=128), 2)
    assert (small - large).abs().mean() < 0.01
    assert small.min() >= 0
    assert small.max() <= 1


@pytest.mark.parametrize("name", GROUNDS[COLOURED:])
def test_pictorial_grounds_vary_but_are_nearest_to_their_own_kind(name: str) -> None:
    picture = F.avg_pool2d(ground(name), 16).flatten(1)
    assert picture.std(0).max() > 0.005
    means = torch.stack([F.avg_pool2d(ground(other), 16).flatten(1).mean(0) for other in GROUNDS[COLOURED:]])
    assert (torch.cdist(picture, means).argmin(1) == GROUNDS.index(name) - COLOURED).all()
