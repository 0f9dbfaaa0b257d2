"""How far a number that was rounded once may be from what it was."""

from __future__ import annotations

import torch


def one_rounding(dtype: torch.dtype, interpreted: bool) -> float:
    """Relative error: half a unit of the last place, and a little float32 arithmetic before it.

    Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest: a whole unit.
    """
    units = 1.0 if interpreted and dtype == torch.bfloat16 else 0.5
    return units * torch.finfo(dtype).eps * 1.01 + 1e-6
