"""The KV write into pages: ours against two indexed assignments of torch, checked first.

    python bench/kv_write.py [--kv-heads 3] [--dim 64]

Torch's skips no rows: ours looks for negative slots, the assignments would take them for places from the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from timing import DEVICE, DTYPES, TOKENS, Case, compare, title

from accel.kernels.kv_write import kv_write, rows_of

PAGES, PAGE = 1024, 16


def assign(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    rows_of(keys)[slots] = k
    rows_of(values)[slots] = v


def cases(kv_heads: int, dim: int) -> Iterator[Case]:
    for dtype in DTYPES:
        for tokens in TOKENS:
            generator = torch.Generator().manual_seed(0)
            keys, values = torch.zeros(2, PAGES, PAGE, kv_heads, dim, dtype=dtype, device=DEVICE)
            fused = torch.randn(tokens, 5 * kv_heads, dim, generator=generator).to(DEVICE, dtype)
            k, v = fused[:, 3 * kv_heads : 4 * kv_heads], fused[:, 4 * kv_heads :]
            slots = torch.randperm(PAGES * PAGE, generator=generator)[:tokens].to(DEVICE)
            kv_write(k, v, keys, values, slots)
            same = torch.equal(rows_of(keys)[slots], k) and torch.equal(rows_of(values)[slots], v)
            others = rows_of(keys).any(-1).any(-1).sum() - tokens
            yield Case(
                f"[{tokens}, {kv_heads}, {dim}] {title(dtype)}",
                lambda k=k, v=v, keys=keys, values=values, slots=slots: kv_write(k, v, keys, values, slots),
                lambda k=k, v=v, keys=keys, values=values, slots=slots: assign(k, v, keys, values, slots),
                float(not same) + float(others),
                0,
                4 * k.nbytes,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    args = parser.parse_args()
    compare(cases(args.kv_heads, args.dim))


if __name__ == "__main__":
    main()
