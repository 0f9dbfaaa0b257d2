"""RMSNorm with the residual added: ours against torch's add_ and rms_norm, checked against float64 first.

python bench/rms_norm.py [--hidden 576]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from timing import DEVICE, DTYPES, TOKENS, Case, compare, relative, rounding, title
from torch.nn import functional

from accel.kernels.rms_norm import add_rms_norm

EPS = 1e-5


def cases(hidden: int) -> Iterator[Case]:
    for dtype in DTYPES:
        for tokens in TOKENS:
            generator = torch.Generator().manual_seed(0)
            x, residual = torch.randn(2, tokens, hidden, generator=generator).to(DEVICE, dtype)
            weight = torch.randn(hidden, generator=generator).to(DEVICE, dtype)
            total = (x + residual).double()
            expected = total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
            yield Case(
                f"[{tokens}, {hidden}] {title(dtype)}",
                lambda x=x, residual=residual, weight=weight: add_rms_norm(x, residual, weight, EPS),
                lambda x=x, residual=residual, weight=weight: functional.rms_norm(
                    residual.add_(x), (hidden,), weight, EPS
                ),
                relative(add_rms_norm(x, residual.clone(), weight, EPS), expected),
                rounding(dtype),
                4 * x.nbytes + weight.nbytes,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    compare(cases(parser.parse_args().hidden))


if __name__ == "__main__":
    main()
