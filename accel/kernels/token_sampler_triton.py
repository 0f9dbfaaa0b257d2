"""Choosing tokens on a GPU: one program a row, which goes over its logits a few times and waits for nothing.

Top-k and top-p need no sort: the least score that may be drawn is found by bisection over the float32 numbers.
"""

# Triton's functions take tensors and pointers that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accel.kernels.philox_triton import philox
from accel.kernels.token_sampler import Sampled, SamplingRows

_BLOCK = 8192  # tokens looked at together


def sample_tokens_triton(logits: torch.Tensor, params: SamplingRows) -> Sampled:
    """As accel.kernels.token_sampler.sample_tokens."""
    rows, size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    counts = logits if params.counts is None else params.counts
    block = min(triton.next_power_of_2(size), _BLOCK)
    _kernel[(rows,)](
        logits,
        *logits.stride(),
        counts,
        *counts.stride(),
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.seeds,
        params.positions,
        tokens,
        logprobs,
        size,
        SEEN=params.counts is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return Sampled(tokens, logprobs)


@triton.jit
def _kernel(
    logits_ptr,
    logits_row,
    logits_column,
    counts_ptr,
    counts_row,
    counts_column,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    penalty_ptr,
    seeds_ptr,
    positions_ptr,
    tokens_ptr,
    logprobs_ptr,
    size,
    SEEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """token <- argmax(score), or the first whose share of the kept mass, added up, passes uniform(seed, position).

    logprob <- logit[token] - log(sum(exp(logit))).
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row
    counts_ptr += row * counts_row
    temperature = tl.load(temperature_ptr + row)
    penalty = tl.load(penalty_ptr + row)
    lane = tl.arange(0, BLOCK)

    highest = tl.full([BLOCK], float("-inf"), tl.float32)  # of the logits as they came
    best_scores = tl.full([BLOCK], float("-inf"), tl.float32)
    best_tokens = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        column = start + lane
        logits = tl.load(logits_ptr + column * logits_column, mask=column < size, other=float("-inf")).to(tl.float32)
        score = logits
        if SEEN:
            score = _penalised(logits, counts_ptr, counts_column, penalty, column, size)
        highest = tl.maximum(highest, logits)
        better = score > best_scores  # of equals, a lane keeps its first
        best_tokens = tl.where(better, column, best_tokens)
        best_scores = tl.where(better, score, best_scores)
    top = tl.max(highest, axis=0)
    best = tl.max(best_scores, axis=0)
    token = tl.min(tl.where(best_scores == best, best_tokens, size - 1), axis=0)

    if temperature > 0:
        floor = best - float("inf")
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < size):
            floor = _least_score(
                top_k.to(tl.float32), floor, best, temperature,
                logits_ptr, logits_column, counts_ptr, counts_column, penalty, size, SEEN, False, BLOCK,
            )  # fmt: skip
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1:
            kept, _, _ = _masses(
                floor, floor, floor, best, temperature,
                logits_ptr, logits_column, counts_ptr, counts_column, penalty, size, SEEN, True, BLOCK,
            )  # fmt: skip
            floor = _least_score(
                top_p * kept, floor, best, temperature,
                logits_ptr, logits_column, counts_ptr, counts_column, penalty, size, SEEN, True, BLOCK,
            )  # fmt: skip
        token = _draw(
            _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row)),
            token, floor, tl.load(min_p_ptr + row), best, temperature,
            logits_ptr, logits_column, counts_ptr, counts_column, penalty, size, SEEN, BLOCK,
        )  # fmt: skip

    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        column = start + lane
        logits = tl.load(logits_ptr + column * logits_column, mask=column < size, other=float("-inf")).to(tl.float32)
        total += tl.exp(logits - top)
    logit = tl.load(logits_ptr + token * logits_column).to(tl.float32)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, logit - top - tl.log(tl.sum(total, axis=0)))


@triton.jit
def _penalised(logits, counts_ptr, counts_column, penalty, column, size):
    seen = tl.load(counts_ptr + column * counts_column, mask=column < size, other=0) > 0
    return tl.where(seen, tl.where(logits > 0, logits / penalty, logits * penalty), logits)


@triton.jit
def _least_score(
    target, floor, best, temperature,
    logits_ptr, logits_column, counts_ptr, counts_column, penalty, size,
    SEEN: tl.constexpr, WEIGHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The greatest number from floor to best such that the scores from it up have a mass of at least target.

    The mass from floor up is at least target. Numbers are told apart by their order among all float32, which are
    fewer than 4^16, and each pass over the logits quarters those in question.
    """
    low = _order(floor)
    high = _order(best) + 1
    for _ in range(16):
        width = high - low
        first = low + (width >> 2)
        second = low + (width >> 1)
        third = low + ((3 * width) >> 2)
        mass1, mass2, mass3 = _masses(
            _number(first), _number(second), _number(third), best, temperature,
            logits_ptr, logits_column, counts_ptr, counts_column, penalty, size, SEEN, WEIGHED, BLOCK,
        )  # fmt: skip
        low = tl.where(mass1 >= target, first, low)
        low = tl.where(mass2 >= target, second, low)
        low = tl.where(mass3 >= target, third, low)
        high = tl.where(mass3 >= target, high, third)
        high = tl.where(mass2 >= target, high, second)
        high = tl.where(mass1 >= target, high, first)
    return _number(low)


@triton.jit
def _masses(
    floor1, floor2, floor3, best, temperature,
    logits_ptr, logits_column, counts_ptr, counts_column, penalty, size,
    SEEN: tl.constexpr, WEIGHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each floor: the sum over scores from it up of exp((score - best) / temperature), or how many they are."""
    lane = tl.arange(0, BLOCK)
    mass1 = tl.zeros([BLOCK], tl.float32)
    mass2 = tl.zeros([BLOCK], tl.float32)
    mass3 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        column = start + lane
        score = tl.load(logits_ptr + column * logits_column, mask=column < size, other=float("-inf")).to(tl.float32)
        if SEEN:
            score = _penalised(score, counts_ptr, counts_column, penalty, column, size)
        mass = tl.exp((score - best) / temperature) if WEIGHED else (column < size).to(tl.float32)
        mass1 += tl.where(score >= floor1, mass, 0.0)
        mass2 += tl.where(score >= floor2, mass, 0.0)
        mass3 += tl.where(score >= floor3, mass, 0.0)
    return tl.sum(mass1, axis=0), tl.sum(mass2, axis=0), tl.sum(mass3, axis=0)


@triton.jit
def _order(number):
    """The place of a float32 among all of them, int64: the bits of a negative one count down."""
    bits = number.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _number(order):
    """The float32 at a place."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _draw(
    share, likeliest, floor, min_p, best, temperature,
    logits_ptr, logits_column, counts_ptr, counts_column, penalty, size,
    SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first kept token with which the running sum of weights exceeds share of their total."""
    lane = tl.arange(0, BLOCK)
    total = 0.0
    for start in range(0, size, BLOCK):
        column = start + lane
        score = tl.load(logits_ptr + column * logits_column, mask=column < size, other=float("-inf")).to(tl.float32)
        if SEEN:
            score = _penalised(score, counts_ptr, counts_column, penalty, column, size)
        weight = tl.exp((score - best) / temperature)
        total += tl.sum(tl.where((score >= floor) & (weight >= min_p), weight, 0.0), axis=0)
    target = share * total
    before = 0.0
    first = size
    last = likeliest
    for start in range(0, size, BLOCK):
        column = start + lane
        score = tl.load(logits_ptr + column * logits_column, mask=column < size, other=float("-inf")).to(tl.float32)
        if SEEN:
            score = _penalised(score, counts_ptr, counts_column, penalty, column, size)
        weight = tl.exp((score - best) / temperature)
        weight = tl.where((score >= floor) & (weight >= min_p), weight, 0.0)
        passed = (before + tl.cumsum(weight, axis=0) > target) & (weight > 0)
        first = tl.minimum(first, tl.min(tl.where(passed, column, size), axis=0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, column, 0), axis=0))
        before += tl.sum(weight, axis=0)
    # The sums of a scan round otherwise than those of a reduction: none may pass a target that is all but the total.
    return tl.where(first < size, first, last)


@triton.jit
def _uniform(seed, position):
    """As accel.kernels.token_sampler.uniform."""
    zero = tl.zeros([1], tl.uint32)
    word, _, _, _ = philox(zero, zero + position.to(tl.uint32), zero + seed.to(tl.uint32))
    return tl.sum((word >> 8).to(tl.float32), axis=0) * 5.9604644775390625e-08
