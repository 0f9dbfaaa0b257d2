"""The Fréchet distance between two sets of pictures, from their features (Heusel et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.errors import ModelError


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean [F] and covariance [F, F] of features, float64, and how many pictures they are of."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int

    @classmethod
    def of(cls, features: torch.Tensor) -> Self:
        """Statistics of features [N, F], N at least 2."""
        if len(features) < 2:
            raise ValueError(f"features: a covariance needs two pictures or more, not {len(features)}")
        features = features.double().cpu()
        return cls(features.mean(0), torch.cov(features.T).reshape(2 * (features.shape[1],)), len(features))

    def save(self, path: Path) -> None:
        """Write a safetensors file: both in float32."""
        tensors = {"mean": self.mean.float(), "covariance": self.covariance.float().contiguous()}
        save_file(tensors, path, metadata={"count": str(self.count)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises ModelError if it is missing, damaged or something else."""
        if not path.is_file():
            raise ModelError(f"{path} is missing")
        try:
            with safe_open(path, framework="pt") as file:
                count = int((file.metadata() or {})["count"])
                mean, covariance = (file.get_tensor(name).double() for name in ("mean", "covariance"))
        except (SafetensorError, OSError, KeyError, ValueError):
            raise ModelError(
                f"{path} holds no feature statistics (mean, covariance and count), or is damaged"
            ) from None
        if mean.dim() != 1 or covariance.shape != 2 * mean.shape:
            raise ModelError(f"{path}: mean {[*mean.shape]} and covariance {[*covariance.shape]} do not fit together")
        return cls(mean, covariance, count)


def frechet(ours: torch.Tensor | Statistics, theirs: torch.Tensor | Statistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of features [N, F] or their statistics.

    The trace of the square root is the sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2).
    The distance of few pictures is biased upwards: compare only figures of equally many.
    """
    a, b = (side if isinstance(side, Statistics) else Statistics.of(side) for side in (ours, theirs))
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))
