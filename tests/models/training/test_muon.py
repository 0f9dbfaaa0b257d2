"""Muon's steps: directions that are nearly orthogonal, of AdamW's size, for the matrices alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from models.training.checkpoints import Checkpoints
from models.training.flat import FlatOptimizer
from models.training.muon import orthogonal
from tests.models.training import small

SHAPES = ((16, 64), (64, 16), (32, 48))


class Net(nn.Module):
    """One of each kind: the first and the last convolution are AdamW's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.mix = nn.Linear(8, 24)
        self.conv_out = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.middle(self.conv_in(x)).relu()).relu()
        mixed: torch.Tensor = self.conv_out(self.mix(x.movedim(1, -1)).movedim(-1, 1))
        return mixed


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    found = orthogonal(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ found @ v.mT
    # The coefficients trade exactness for speed: 0.68 to 1.21 (Jordan et al. 2024).
    within = values.diagonal(dim1=1, dim2=2)
    assert 0.6 < within.min() < within.max() < 1.25
    assert (values - torch.diag_embed(within)).abs().max() < 1e-4


def gradients(net: Net, seed: int) -> None:
    torch.manual_seed(seed)
    net(torch.randn(4, 3, 8, 8)).square().mean().backward()


def flat(weights: torch.Tensor) -> torch.Tensor:
    """A weight as the matrix that Muon sees: a convolution's lies channels-last."""
    return (weights.permute(0, 2, 3, 1) if weights.dim() == 4 else weights).reshape(len(weights), -1)


def test_the_first_step_of_a_matrix_is_its_gradients_direction() -> None:
    net = Net()
    optimizer = FlatOptimizer(net, small.ranks(), average=0.9, muon=True)
    before = {name: value.clone() for name, value in net.named_parameters()}
    gradients(net, 1)
    wanted = {name: value.grad.clone() for name, value in net.named_parameters() if value.grad is not None}
    optimizer.step(1e-2)
    for name, value in net.named_parameters():
        moved = (value - before[name]).detach()
        if value.dim() >= 2 and not name.startswith("conv_"):
            rows = flat(moved)
            direction = orthogonal(flat(wanted[name])[None])[0]
            expected = -1e-2 * 0.2 * max(rows.shape) ** 0.5 * direction
            torch.testing.assert_close(rows, expected, rtol=1e-3, atol=2e-5)
        else:  # AdamW's first step is the rate, in the gradient's sign
            torch.testing.assert_close(moved.abs().max(), torch.tensor(1e-2), rtol=1e-3, atol=0)


def test_resume_continues_exactly(tmp_path: Path) -> None:
    """Six steps, or three, a checkpoint, and three more, end in the same weights."""

    def fresh() -> tuple[Net, FlatOptimizer]:
        net = Net()
        return net, FlatOptimizer(net, small.ranks(), average=0.9, muon=True)

    def train(net: Net, optimizer: FlatOptimizer, steps: range) -> None:
        for step in steps:
            gradients(net, step)
            optimizer.step(1e-2)

    net, whole = fresh()
    train(net, whole, range(6))
    net, first = fresh()
    train(net, first, range(3))
    checkpoints = Checkpoints(tmp_path, small.ranks())
    checkpoints.save("stage", {"optimizer": first.state(), "seconds": 1.0}, finished=False)
    net, second = fresh()
    checkpoints.resume("stage", second)
    train(net, second, range(3, 6))
    torch.testing.assert_close(second.master, whole.master, rtol=0, atol=0)
