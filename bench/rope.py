"""RoPE of a fused projection's queries and keys: ours, in place, against the usual rotate-half in the model's dtype.

    python bench/rope.py [--heads 9] [--kv-heads 3] [--dim 64]

Ours is checked against float64 first. The other's cosines and sines are gathered beforehand, ours at each call.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from timing import DEVICE, DTYPES, TOKENS, Case, compare, relative, rounding, title

from accel.kernels.rope import rope, rope_table

POSITIONS = 8192


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def cases(heads: int, kv_heads: int, dim: int) -> Iterator[Case]:
    table = rope_table(POSITIONS, dim, 100000.0, DEVICE)
    for dtype in DTYPES:
        for tokens in TOKENS:
            generator = torch.Generator().manual_seed(0)
            fused = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=generator).to(DEVICE, dtype)
            positions = torch.randint(POSITIONS, (tokens,), generator=generator).to(DEVICE)
            q, k = fused[:, :heads], fused[:, heads : heads + kv_heads]
            angles = [half.repeat(1, 2)[:, None] for half in table[positions].chunk(2, dim=-1)]
            expected = rotate_half(fused[:, : heads + kv_heads].double(), *(angle.double() for angle in angles))
            turned = fused.clone()
            rope(turned[:, :heads], turned[:, heads : heads + kv_heads], table, positions)
            cos, sin = (angle.to(dtype) for angle in angles)
            yield Case(
                f"[{tokens}, {heads}+{kv_heads}, {dim}] {title(dtype)}",
                lambda q=q, k=k, positions=positions: rope(q, k, table, positions),
                lambda q=q, k=k, cos=cos, sin=sin: (rotate_half(q, cos, sin), rotate_half(k, cos, sin)),
                relative(turned[:, : heads + kv_heads], expected),
                rounding(dtype),
                2 * (q.nbytes + k.nbytes) + tokens * dim * 4,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    args = parser.parse_args()
    compare(cases(args.heads, args.kv_heads, args.dim))


if __name__ == "__main__":
    main()
