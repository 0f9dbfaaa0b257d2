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
    """In plain torch, for any device, a row at a time where tokens are drawn. On a GPU it waits for each such row."""
    logits = logits.float()
    scores = _penalised(logits, params)
    tokens = scores.argmax(dim=-1)
    drawn = (params.temperature > 0).nonzero().flatten()
    if len(drawn):  # the uniform numbers are a hundred small operations
        columns = (params.temperature, params.top_k, params.top_p, params.min_p)
        asked = (*(column[drawn] for column in columns), uniform(params.seeds[drawn], params.positions[drawn]))
        for row, *values in zip(drawn.tolist(), *(column.tolist() for column in asked), strict=True):
            tokens[row] = _draw(scores[row], *values)
    return Sampled(tokens, logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0])


def _penalised(logits: torch.Tensor, params: SamplingRows) -> torch.Tensor:
    if params.counts is None:
        return logits
    penalty = params.repetition_penalty[:, None]
    return torch.where(params.counts > 0, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _draw(
    scores: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, share: float
) -> torch.Tensor:
    """The first token, of those kept, with which the running sum of weights exceeds `share` of their total.

    Args:
        scores: [V] float32, penalised logits.
        share: in [0, 1).
    """
    weights = torch.exp((scores - scores.max()) / temperature)
    if 0 < top_k < len(scores):
        weights[scores < scores.topk(top_k).values[-1]] = 0
    if top_p < 1:
        weights[weights < _least_of_nucleus(weights, top_p)] = 0
    weights[weights < min_p] = 0
    kept = weights.nonzero().flatten()
    cumulative = weights[kept].cumsum(dim=0, dtype=torch.float64)
    place = torch.searchsorted(cumulative, share * cumulative[-1], right=True)
    return kept[place.clamp(max=len(kept) - 1)]


def _least_of_nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest of the fewest largest weights that sum to top_p of the total."""
    wanted = top_p * weights.sum(dtype=torch.float64)
    size = min(_HEAD, len(weights))
    head = weights.topk(size).values
    place = torch.searchsorted(head.cumsum(dim=0, dtype=torch.float64), wanted)
    if place == size:
        head = weights.sort(descending=True).values
        place = torch.searchsorted(head.cumsum(dim=0, dtype=torch.float64), wanted)
    return head[place.clamp(max=len(head) - 1)]


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[B] float32 in [0, 1), multiples of 2^-24: Philox with key (seed, 0) and counter (0, position, 0, 0)."""
    zero = torch.zeros_like(seeds)
    word = philox((zero, positions & _WORD, zero, zero), (seeds & _WORD, zero))[0]
    return (word >> 8).float() * 2.0**-24
