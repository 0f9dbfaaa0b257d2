"""Pages of keys and values: time to copy some (copy-on-write) and to move them to host memory and back.

    python bench/paged_kv.py

Pages are those of SmolLM2-135M: 30 layers, 3 key-value heads of 64, 16 tokens. float32 on the CPU, bfloat16 on a GPU.
What comes back from the host is compared with what went there.
"""

from __future__ import annotations

import sys

import torch
from paged import DEVICE, DIM, DTYPE, KV_HEADS, PAGE, median_us
from timing import print_table

from accel.memory.paged_kv import HostPages, PagedKV, page_bytes

LAYERS, PAGES, HALF = 30, 256, 128


@torch.inference_mode()
def main() -> None:
    size = page_bytes(LAYERS, PAGE, KV_HEADS, DIM, DTYPE)
    kv = PagedKV(LAYERS, PAGES, PAGE, KV_HEADS, DIM, DTYPE, DEVICE)
    host = HostPages(kv, HALF)
    for tensor in [*kv.keys, *kv.values]:
        tensor.normal_()
    host.swap_out(range(HALF), range(HALF))
    host.swap_in(range(HALF), range(HALF, PAGES))
    if any(not torch.equal(tensor[:HALF], tensor[HALF:]) for tensor in [*kv.keys, *kv.values]):
        sys.exit("pages came back from the host with other contents")
    print(f"\n{DEVICE}, torch {torch.__version__}, pages of {size / 2**10:.0f} KiB, medians; GB/s count each byte once")

    def rows() -> list[list[str]]:
        table = []
        for count in (1, 16, HALF):
            here, there = list(range(count)), list(range(HALF, HALF + count))
            row = [str(count)]
            for us in (
                median_us(lambda here=here, there=there: kv.copy(list(zip(here, there, strict=True)))),
                median_us(lambda here=here: host.swap_out(here, here)),
                median_us(lambda here=here: host.swap_in(here, here)),
            ):
                row.append(f"{us:.0f} µs, {count * size / us / 1e3:.1f} GB/s")
            table.append(row)
        return table

    print_table(["pages", "copy", "swap out", "swap in"], rows())


if __name__ == "__main__":
    main()
