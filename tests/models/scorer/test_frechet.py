"""The Fréchet distance against its closed forms."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ModelError
from models.scorer.frechet import Statistics, frechet


def statistics(mean: torch.Tensor, covariance: torch.Tensor) -> Statistics:
    return Statistics(mean.double(), covariance.double(), 100)


def test_commuting_covariances_have_a_closed_form() -> None:
    """|m1 - m2|^2 + sum (sqrt a - sqrt b)^2 for covariances with the same axes."""
    axes = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    a, b = torch.arange(6.0).double(), torch.tensor([2.0, 0, 5, 1, 0, 9]).double()
    shift = torch.tensor([0.5, 0, -1, 0, 0, 2]).double()
    ours = statistics(torch.zeros(6), axes * a @ axes.T)
    theirs = statistics(shift, axes * b @ axes.T)
    expected = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet(ours, theirs) == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 1000))
def test_it_is_symmetric_and_nought_only_for_the_same(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(20, 5, generator=generator) for _ in range(2))
    assert frechet(ours, ours) == pytest.approx(0, abs=1e-6)
    assert frechet(ours, theirs) == pytest.approx(frechet(theirs, ours), rel=1e-6)
    assert frechet(ours, theirs) > 0.01
    assert frechet(ours, ours + 3) == pytest.approx(5 * 9, rel=1e-5)


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    features = torch.randn(50, 4)
    Statistics.of(features).save(tmp_path / "reference.safetensors")
    again = Statistics.load(tmp_path / "reference.safetensors")
    assert again.count == 50
    assert frechet(features, again) == pytest.approx(0, abs=1e-5)


def test_faulty_statistics_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with pytest.raises(ModelError, match="is missing"):
        Statistics.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="holds no feature statistics"):
        Statistics.load(path)
    Statistics(torch.zeros(3), torch.eye(4), 5).save(path)
    with pytest.raises(ModelError, match=r"mean \[3\] and covariance \[4, 4\] do not fit"):
        Statistics.load(path)
    with pytest.raises(ValueError, match="two pictures or more"):
        Statistics.of(torch.zeros(1, 4))
