"""Choosing the next token of each sequence of a batch: greedy, or drawn after temperature, top-k, top-p and min-p.

A row's token is a function of its own logits and parameters: its randomness is one Philox number of (seed, position).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accel.kernels.choice import use_triton
from accel.samplers.noise import philox

_WORD = 0xFFFFFFFF
_HEAD = 1024  # likeliest tokens that are sorted first: most nuclei end among them, and a full sort takes far longer


@dataclass(frozen=True)
class SamplingRows:
    """What each row asks for, in this order: penalty, temperature, top-k, top-p of what is left, min-p.

    Attributes:
        temperature: [B] float32; 0 takes the likeliest token, of equals the lowest id.
        top_k: [B] int64; 0 keeps all. Tokens as likely as the k-th are kept.
        top_p: [B] float32; the fewest likeliest tokens with this share of the mass, and those as likely as the last.
        min_p: [B] float32; tokens at least this share as likely as the likeliest.
        repetition_penalty: [B] float32; divides the positive logits of seen tokens, multiplies the others.
        seeds, positions: [B] int64; the lower 32 bits count.
        counts: [B, V] integers, how often each token was seen; None where no row has a penalty.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor | None = None


@dataclass(frozen=True)
class Sampled:
    """Tokens [B] int64 and their log-probabilities [B] float32 under softmax(logits), before any parameter acts.

    A log-probability that is not finite means logits that hold NaN, +inf or nothing above -inf; the token is then
    one of the vocabulary, but of no meaning.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor


def sample_tokens(logits: torch.Tensor, params: SamplingRows) -> Sampled:
    """Choose one token a row.

    Args:
        logits: [B, V], any floating dtype; computed with in float32. -inf forbids a token.
    """
    if use_triton(logits):
        from accel.kernels.token_sampler_triton import sample_tokens_triton as sample
    else:
        sample = sample_tokens_reference
    return sample(logits, params)


def top_logprobs(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens of each row of logits [B, V]: ids [B, count] int64, log-probabilities [B, count] float32."""
    logprobs, tokens = logits.float().log_softmax(dim=-1).topk(count, dim=-1)
    return tokens, logprobs


def sample_tokens_reference(logits: torch.Tensor, params: SamplingRows) -> Sampled:
    """In plain torch, for any device. On a GPU it waits to see which parameters are in use."""
    logits = logits.float()
    scores = _penalised(logits, params)
    tokens = scores.argmax(dim=-1)
    drawn = (params.temperature > 0).nonzero().flatten()
    if len(drawn):
        tokens[drawn] = _draw(scores[drawn], params, drawn)
    return Sampled(tokens, logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0])


def _penalised(logits: torch.Tensor, params: SamplingRows) -> torch.Tensor:
    if params.counts is None:
        return logits
    penalty = params.repetition_penalty[:, None]
    return torch.where(params.counts > 0, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _draw(scores: torch.Tensor, params: SamplingRows, rows: torch.Tensor) -> torch.Tensor:
    """Tokens [R] of the given rows of params, whose penalised logits are scores [R, V]."""
    best = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp((scores - best) / params.temperature[rows, None])
    _cut_to_top_k(weights, scores, params.top_k[rows])
    _cut_to_top_p(weights, params.top_p[rows])
    weights[weights < params.min_p[rows, None]] = 0
    # Sums are running ones: their order, unlike that of sum(), is the same for any number of rows.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    target = uniform(params.seeds[rows], params.positions[rows])[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=scores.shape[1] - 1)


def _cut_to_top_k(weights: torch.Tensor, scores: torch.Tensor, top_k: torch.Tensor) -> None:
    rows = ((top_k > 0) & (top_k < scores.shape[1])).nonzero().flatten()
    if len(rows):
        counts = top_k[rows]
        floors = scores[rows].topk(int(counts.max()), dim=-1).values.gather(1, counts[:, None] - 1)
        weights[rows] = torch.where(scores[rows] >= floors, weights[rows], 0)


def _cut_to_top_p(weights: torch.Tensor, top_p: torch.Tensor) -> None:
    rows = (top_p < 1).nonzero().flatten()
    size = min(_HEAD, weights.shape[1])
    while len(rows):
        mine = weights[rows]
        wanted = top_p[rows, None] * mine.cumsum(dim=-1, dtype=torch.float64)[:, -1:]
        head = mine.topk(size, dim=-1).values
        enough = head.cumsum(dim=-1, dtype=torch.float64) >= wanted
        found = enough.any(dim=-1) | (size == weights.shape[1])
        # Where rounding leaves the whole row short of its own sum, the last is the smallest: nothing is cut.
        last = torch.where(enough.any(dim=-1), enough.int().argmax(dim=-1), size - 1)
        floors = head.gather(1, last[:, None])
        weights[rows[found]] = torch.where(mine >= floors, mine, 0)[found]
        rows, size = rows[~found], weights.shape[1]


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[B] float32 in [0, 1), multiples of 2^-24: Philox with key (seed, 0) and counter (0, position, 0, 0)."""
    zero = torch.zeros_like(seeds)
    word = philox((zero, positions & _WORD, zero, zero), (seeds & _WORD, zero))[0]
    return (word >> 8).float() * 2.0**-24
