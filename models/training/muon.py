"""Muon (Jordan et al. 2024): a matrix steps along its momentum's nearest semi-orthogonal matrix.

A plain gradient step moves a weight matrix mostly in its few largest directions; orthogonalised, it moves in all of
them alike. On this recipe's UNet in miniature it reaches AdamW's loss in about half the steps.
"""

from collections.abc import Sequence

import torch

_MOMENTUM = 0.95
_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: takes singular values from (0, 1] to about 1, fast
_RMS = 0.2  # of an update's elements at rate 1, as AdamW's are in practice (Liu et al. 2025), so that both share a rate


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The matrices with their singular values near 1, by Newton and Schulz's iteration: [N, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x: torch.Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon:
    """The momentum of some matrices within a flat vector, and their steps.

    Args:
        places: offset, rows and columns of each matrix.
        dtype: of the iteration's arithmetic; bfloat16 is enough for it.
    """

    def __init__(self, flat: torch.Tensor, places: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> None:
        self.momentum = torch.zeros_like(flat)
        self._dtype = dtype
        self._groups: dict[tuple[int, int], list[int]] = {}
        for offset, rows, columns in places:
            self._groups.setdefault((rows, columns), []).append(offset)

    @torch.no_grad()
    def step(self, flat: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Move the matrices within `flat`, and set their parts of `gradient` to zero: nobody else is to use them."""
        self.momentum.lerp_(gradient, 1 - _MOMENTUM)
        ahead = gradient.lerp(self.momentum, _MOMENTUM)  # Nesterov's
        for (rows, columns), offsets in self._groups.items():
            parts = [slice(offset, offset + rows * columns) for offset in offsets]
            stacked = torch.stack([ahead[part] for part in parts]).view(-1, rows, columns).to(self._dtype)
            directions = orthogonal(stacked).float().reshape(len(parts), -1)
            step = -rate * _RMS * max(rows, columns) ** 0.5
            torch._foreach_add_([flat[part] for part in parts], list(directions.unbind()), alpha=step)
            torch._foreach_zero_([gradient[part] for part in parts])
