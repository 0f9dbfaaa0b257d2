"""A sampler is a plan: a table with one row per step, computed on the host in float64.

All plans live in one space, the variance-preserving one: x = alpha * x0 + sqrt(1 - alpha^2) * noise. Samplers that
their papers write in the variance-exploding space (Euler, DPM++, consistency models) are rescaled into it row by row,
so that a row's `alpha` is the noise level of its input whichever sampler wrote it, and a latent can move from one plan
to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """One step: evaluate the network at (x, t), then x <- a*x + b*denoised + c*previous + s*noise(seed, row)."""

    t: float  # timestep handed to the network; fractional for Karras spacing
    alpha: float  # signal scale of the input x, in [0, 1]
    a: float
    b: float
    c: float  # on the previous row's denoised; 0 for the first row that is run, which has none
    s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows that remain to be run, and where they stand in the whole.

    first: index of rows[0] in the full plan (K for a plan entered at row K). Noise is keyed by the full plan's row
        index, so a plan entered at K draws the same noise in its rows as the full plan does.
    init_scale: standard deviation of the initial noise in variance-preserving space, used when first == 0.
    """

    sampler: str
    rows: tuple[Row, ...]
    init_scale: float
    first: int = 0

    def __len__(self) -> int:
        return len(self.rows)
