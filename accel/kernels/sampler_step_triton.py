"""The fused update of one sampling step on a GPU: one pass over memory, noise made in registers, no waiting."""

# Triton's functions take tensors and pointers that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel.kernels.philox_triton import philox

_CALLS_PER_PROGRAM = 256  # Philox calls; each makes the noise of four elements


def sampler_step_triton(
    x: torch.Tensor,
    previous: torch.Tensor,
    slots: torch.Tensor,
    denoised: torch.Tensor,
    coefficients: torch.Tensor,
    seeds: torch.Tensor,
    rows: torch.Tensor,
    finite: torch.Tensor,
) -> None:
    """As accel.kernels.sampler_step.sampler_step."""
    size = x[0].numel()
    grid = (triton.cdiv(size, 4 * _CALLS_PER_PROGRAM), len(slots))
    _kernel[grid](
        x,
        previous,
        slots,
        denoised.contiguous(),
        coefficients.contiguous(),
        seeds,
        rows,
        finite.view(torch.uint8),
        size,
        CALLS=_CALLS_PER_PROGRAM,
    )


@triton.jit
def _kernel(
    x_ptr,
    previous_ptr,
    slots_ptr,
    denoised_ptr,
    coefficients_ptr,
    seeds_ptr,
    rows_ptr,
    finite_ptr,
    size,
    CALLS: tl.constexpr,
):
    """x[slot] <- a x[slot] + b denoised + c previous[slot] + s noise(seed, row); previous[slot] <- denoised.

    Program (i, j) does elements 4 * CALLS * i ... of row j of the batch.
    """
    row = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    a = tl.load(coefficients_ptr + 4 * row)
    b = tl.load(coefficients_ptr + 4 * row + 1)
    c = tl.load(coefficients_ptr + 4 * row + 2)
    s = tl.load(coefficients_ptr + 4 * row + 3)

    elements = tl.program_id(0) * 4 * CALLS + tl.arange(0, 4 * CALLS)
    inside = elements < size
    at_slot = slot * size + elements
    denoised = tl.load(denoised_ptr + row.to(tl.int64) * size + elements, mask=inside, other=0.0).to(tl.float32)
    updated = b * denoised
    if a != 0:
        updated += a * tl.load(x_ptr + at_slot, mask=inside, other=0.0)
    if c != 0:
        updated += c * tl.load(previous_ptr + at_slot, mask=inside, other=0.0)
    if s != 0:
        calls = tl.program_id(0) * CALLS + tl.arange(0, CALLS)
        updated += s * _gaussian(tl.load(seeds_ptr + row), tl.load(rows_ptr + row), calls)

    tl.store(x_ptr + at_slot, updated, mask=inside)
    tl.store(previous_ptr + at_slot, denoised, mask=inside)
    # Programs of a row only ever write False, so they need no order among them. NaN and infinity fail the comparison.
    wrong = tl.sum((inside & ~(tl.abs(updated) < float("inf"))).to(tl.int32), axis=0)
    tl.store(finite_ptr + slot, 0, mask=wrong > 0)


@triton.jit
def _gaussian(seed, row, calls):
    """[4 * len(calls)] normals; the same numbers as accel.samplers.noise.gaussian."""
    zero = tl.zeros_like(calls).to(tl.uint32)
    w0, w1, w2, w3 = philox(calls.to(tl.uint32), zero + (row + 1).to(tl.uint32), seed.to(tl.uint32))
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _box_muller(first, second):
    radius = tl.sqrt(-2.0 * tl.log(first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    angle = second.to(tl.float32) * 1.4629180792671596e-09
    return radius * tl.cos(angle), radius * tl.sin(angle)
