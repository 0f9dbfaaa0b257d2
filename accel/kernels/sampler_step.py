"""The fused update of one sampling step: x <- a*x + b*denoised + c*previous + s*noise, previous <- denoised."""

from __future__ import annotations

import torch

from accel.kernels.choice import use_triton
from accel.samplers.noise import gaussian


def sampler_step(
    x: torch.Tensor,
    previous: torch.Tensor,
    slots: torch.Tensor,
    denoised: torch.Tensor,
    coefficients: torch.Tensor,
    seeds: torch.Tensor,
    rows: torch.Tensor,
    finite: torch.Tensor,
) -> None:
    """Advance the pictures of a batch by one row of their plans, in place.

    Where a = 0 or c = 0, x or `previous` is not read, so what an earlier owner left in the slot does no harm; where
    s = 0 no noise is drawn. A picture therefore starts with coefficients (0, 0, 0, init_scale), row INITIAL_ROW and
    `denoised` of zeros.

    Args:
        x, previous: [S, C, h, w] float32, contiguous, the latent slots of one resolution; written at `slots`.
        slots: [B] int64, distinct.
        denoised: [B, C, h, w], any floating dtype; computed with in float32.
        coefficients: [B, 4] float32, (a, b, c, s).
        seeds: [B] int64, values of uint32.
        rows: [B] int64, index of each row in its full plan.
        finite: [S] bool, and-ed with "every element of the new x is finite".
    """
    if use_triton(x):
        from accel.kernels.sampler_step_triton import sampler_step_triton as step
    else:
        step = sampler_step_reference
    step(x, previous, slots, denoised, coefficients, seeds, rows, finite)


def sampler_step_reference(
    x: torch.Tensor,
    previous: torch.Tensor,
    slots: torch.Tensor,
    denoised: torch.Tensor,
    coefficients: torch.Tensor,
    seeds: torch.Tensor,
    rows: torch.Tensor,
    finite: torch.Tensor,
) -> None:
    """The update in plain torch, for any device. On a GPU it waits to read back which rows draw noise."""
    denoised = denoised.float()
    a, b, c, s = coefficients.view(-1, 4, 1, 1, 1).unbind(1)
    updated = torch.where(a != 0, a * x[slots], 0.0) + b * denoised
    with_history = coefficients[:, 2].nonzero().flatten()
    if len(with_history):
        updated[with_history] += c[with_history] * previous[slots[with_history]]
    drawing = coefficients[:, 3].nonzero().flatten()
    if len(drawing):
        noise = gaussian(seeds[drawing], rows[drawing], tuple(x.shape[1:]), x.device)
        updated[drawing] += s[drawing] * noise
    x[slots] = updated
    previous[slots] = denoised
    finite[slots] &= updated.isfinite().flatten(1).all(1)
