"""SwiGLU: ours against torch's silu and product, checked against float64 first.

python bench/swiglu.py [--ffn 1536]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from timing import DEVICE, DTYPES, TOKENS, Case, compare, relative, rounding, title
from torch.nn import functional

from accel.kernels.swiglu import swiglu


def cases(ffn: int) -> Iterator[Case]:
    for dtype in DTYPES:
        for tokens in TOKENS:
            gate_up = torch.randn(tokens, 2 * ffn, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
            gate, up = gate_up.double().chunk(2, dim=-1)
            yield Case(
                f"[{tokens}, {ffn}] {title(dtype)}",
                lambda gate_up=gate_up: swiglu(gate_up),
                lambda gate_up=gate_up, ffn=ffn: functional.silu(gate_up[:, :ffn]) * gate_up[:, ffn:],
                relative(swiglu(gate_up), gate * gate.sigmoid() * up),
                rounding(dtype),
                gate_up.nbytes * 3 // 2,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ffn", type=int, default=1536)
    compare(cases(parser.parse_args().ffn))


if __name__ == "__main__":
    main()
