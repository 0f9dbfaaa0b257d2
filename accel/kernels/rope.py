"""Rotary position embedding. Su et al. 2021, "RoFormer"; pairs are (i, i + D/2), as in Llama's published weights.

Element i of a head turns with element i + D/2 by the angle position * theta^(-2i/D). Longer contexts than a model was
trained on come from slower angles (`RopeScaling`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from accel.kernels.choice import use_triton


@dataclass(frozen=True)
class LinearScaling:
    """Every angle is divided by `factor`. Chen et al. 2023, "position interpolation"."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: waves longer than the original context are slowed by `factor`, short ones kept, those between mixed.

    Fields are those of config.json's rope_scaling; a frequency here counts turns in the original context.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearScaling | Llama3Scaling


def rope_table(
    positions: int, dim: int, theta: float, device: torch.device | str, scaling: RopeScaling | None = None
) -> torch.Tensor:
    """Cosines and sines of every position, in float32 as the models were trained with.

    Args:
        positions: how many, from 0.
        dim: D of a head, even.
        theta: base of the wavelengths.

    Returns:
        [positions, D] float32: D/2 cosines, then D/2 sines.

    Raises:
        ValueError: an odd or non-positive dim.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim is {dim}: a head that rotates has a positive, even number of elements")
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = torch.arange(positions, dtype=torch.float32).view(-1, 1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    slow = frequencies / scaling.factor
    if isinstance(scaling, LinearScaling):
        return slow
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(slow, frequencies, kept.clamp(0, 1))


def rope(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> None:
    """Rotate queries and keys in place. Computed in float32 and rounded once.

    Args:
        q: [T, Hq, D]; k: [T, Hkv, D]. At any stride (slices of a fused projection).
        table: [P, D] float32, of `rope_table`.
        positions: [T] int64, each less than P.
    """
    if use_triton(q):
        from accel.kernels.rope_triton import rope_triton as turn
    else:
        turn = rope_reference
    turn(q, k, table, positions)


def rope_reference(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> None:
    """In plain torch, for any device."""
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
    for x in (q, k):
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        for half, value in zip(x.chunk(2, dim=-1), turned, strict=True):
            half.copy_(value)
