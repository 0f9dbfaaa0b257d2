"""Sampling tokens: ours against the usual sort, cumulative sum and exponential noise in torch.

    python bench/token_sampler.py [--vocab 49152]

Ours is first compared with the torch reference on more rows of the same kind; "difference" is the share of rows whose
token differs, which rounding alone makes tiny but not zero on a GPU. Both return the token's log-probability. Torch's
is one path for the whole batch, chosen beforehand; ours decides row by row and draws by seed and position.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from timing import DEVICE, Case, compare

from accel.kernels.token_sampler import SamplingRows, sample_tokens, sample_tokens_reference

CHECKED = 256 if DEVICE == "cuda" else 8
KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}


def parameters(rows: int, values: dict[str, Any]) -> SamplingRows:
    def column(name: str, default: float) -> torch.Tensor:
        return torch.full((rows,), values.get(name, default), dtype=torch.float32, device=DEVICE)

    return SamplingRows(
        temperature=column("temperature", 1),
        top_k=column("top_k", 0).long(),
        top_p=column("top_p", 1),
        min_p=column("min_p", 0),
        repetition_penalty=column("repetition_penalty", 1),
        seeds=torch.arange(rows, device=DEVICE),
        positions=torch.zeros(rows, dtype=torch.int64, device=DEVICE),
    )


def usual(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> tuple[torch.Tensor, ...]:
    """[B] tokens and [B] log-probabilities; without waiting for the device."""
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    elif top_k or top_p < 1:
        values, order = (logits / temperature).sort(-1, descending=True)
        if top_k:
            values[:, top_k:] = -torch.inf
        weights = values.softmax(-1)
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p, 0)
        tokens = order.gather(1, (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True))
    else:
        weights = (logits / temperature).softmax(-1)
        tokens = (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)
    return tokens[:, 0], logits.log_softmax(-1).gather(1, tokens)[:, 0]


def cases(vocab: int) -> Iterator[Case]:
    # About as peaked as a language model's: a few tokens share most of the mass.
    logits = (3 * torch.randn(CHECKED, vocab, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    logits[:, ::997] += 9
    for kind, values in KINDS.items():
        params = parameters(CHECKED, values)
        differs = sample_tokens(logits, params).tokens != sample_tokens_reference(logits, params).tokens
        for rows in (1, 16, 256) if DEVICE == "cuda" else (1, 8):
            mine, some = logits[:rows], parameters(rows, values)
            yield Case(
                f"{kind}, [{rows}, {vocab}]",
                lambda mine=mine, some=some: sample_tokens(mine, some),
                lambda mine=mine, values=values: usual(mine, **values),
                float(differs.float().mean()),
                0.02,
                mine.nbytes,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=49152)
    compare(cases(parser.parse_args().vocab))


if __name__ == "__main__":
    main()
