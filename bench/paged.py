"""Attention over pages and over contiguous slots, per layer: decoding and prefill, beside torch's own attention.

    python bench/paged.py [--only decode|prefill]

The shape is SmolLM2-135M's: 9 query and 3 key-value heads of 64. Eight layers are run with one plan, as in a forward
pass, the writing of new keys and values included. torch's own is scaled_dot_product_attention over keys and values that
already lie as one padded tensor, with a mask where lengths differ: it neither gathers nor writes. Lengths of a ragged
batch are drawn between 1 and the context. float32 on the CPU, bfloat16 on a GPU. Results are checked before they are
timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from timing import print_table

from accel.attention.batch import Attend, ContiguousAttend, PagedAttend
from accel.memory.paged_kv import PagedKV

LAYERS, HEADS, KV_HEADS, DIM, PAGE = 8, 9, 3, 64, 16
SCALE = DIM**-0.5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def median_us(action: Callable[[], object], seconds: float = 1.0) -> float:
    """Median microseconds of a call. On a GPU launching counts unless a graph is replayed."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    times: list[float] = []
    for _ in range(3):
        action()
    until = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < until and len(times) < 500):
        wait()
        start = time.perf_counter()
        action()
        wait()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def captured(action: Callable[[], object]) -> Callable[[], object]:
    """The action as a CUDA graph, as decoding runs it; on the CPU as it is."""
    if DEVICE == "cpu":
        return action
    action()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


class Load:
    """Sequences with `new` tokens each, the last of `lengths`, in pages (in random order) and in slots."""

    def __init__(self, lengths: list[int], new: int) -> None:
        batch, longest = len(lengths), max(lengths)
        columns = -(-longest // PAGE)
        torch.manual_seed(0)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.new = new
        order = torch.randperm(batch * columns).view(batch, columns)
        self.paged = PagedKV(LAYERS, batch * columns, PAGE, KV_HEADS, DIM, DTYPE, DEVICE)
        room = columns * PAGE
        slots = torch.randn(LAYERS, 2, batch, room, KV_HEADS, DIM, dtype=DTYPE, device=DEVICE)
        self.slots = slots
        for layer in range(LAYERS):
            pages = slots[layer].view(2, batch * columns, PAGE, KV_HEADS, DIM)
            self.paged.keys[layer][order.flatten()] = pages[0]
            self.paged.values[layer][order.flatten()] = pages[1]
        starts = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * new
        positions = torch.cat([torch.arange(length - new, length) for length in lengths])
        sequences = torch.arange(batch).repeat_interleave(new)
        in_pages = order[sequences, positions // PAGE] * PAGE + positions % PAGE
        in_slots = sequences * room + positions
        decodes = batch if new == 1 else 0
        tables = order.to(DEVICE, torch.int32)
        self.attends: dict[str, Attend] = {
            "paged": PagedAttend(self.paged, tables, in_pages.to(DEVICE), starts, self.lengths, decodes, SCALE),
            "contiguous": ContiguousAttend(
                SimpleNamespace(keys=lambda layer: slots[layer, 0], values=lambda layer: slots[layer, 1]),
                torch.arange(batch, dtype=torch.int32, device=DEVICE),
                in_slots.to(DEVICE),
                starts,
                self.lengths,
                decodes,
                SCALE,
            ),
        }
        self.q = torch.randn(batch * new, HEADS, DIM, dtype=DTYPE, device=DEVICE)
        where = in_slots.to(DEVICE)
        flat = slots.view(LAYERS, 2, -1, KV_HEADS, DIM)
        self.new_kv = [(flat[layer, 0, where], flat[layer, 1, where]) for layer in range(LAYERS)]
        positions = torch.arange(room, device=DEVICE)
        last = self.lengths[:, None] - new + torch.arange(new, device=DEVICE)  # position of each query
        self.mask = (positions <= last[:, :, None]).unsqueeze(1)  # [B, 1, new, room]
        if new == 1 and min(lengths) == room:
            self.mask = None

    def run(self, name: str) -> torch.Tensor:
        """All layers; returns the last one's [T, Hq, D]."""
        attend = self.attends[name]
        for layer in range(LAYERS):
            out = attend(layer, self.q, *self.new_kv[layer])
        return out

    def torchs_own(self) -> torch.Tensor:
        q = self.q.view(len(self.lengths), self.new, HEADS, DIM).transpose(1, 2)
        causal = self.mask is not None and self.new == self.slots.shape[3]
        for layer in range(LAYERS):
            k, v = self.slots[layer].transpose(2, 3)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None if causal else self.mask, is_causal=causal, scale=SCALE, enable_gqa=True
            )
        return out.transpose(1, 2).reshape(-1, HEADS, DIM)

    def check(self) -> None:
        expected = self.torchs_own()
        for name in self.attends:
            difference = float((self.run(name) - expected).abs().max())
            if not difference < (2e-2 if DEVICE == "cuda" else 1e-4):
                sys.exit(f"{name} attention differs from torch's by {difference:.1e}")


def measured(load: Load) -> list[str]:
    load.check()
    wrap = captured if load.new == 1 else lambda action: action
    own = median_us(wrap(load.torchs_own)) / LAYERS
    row = [f"{own:.0f}"]
    for name in load.attends:
        row.append(f"{median_us(wrap(lambda name=name: load.run(name))) / LAYERS:.0f}")
    return row


def ragged(batch: int, context: int) -> list[int]:
    """Lengths between 1 and the context, one of them the context."""
    drawn = torch.randint(1, context + 1, (batch,), generator=torch.Generator().manual_seed(0)).tolist()
    return [context, *drawn[1:]]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["decode", "prefill"])
    only = parser.parse_args().only
    gpu = DEVICE == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{name}, torch {torch.__version__}, {DTYPE}, µs a layer, medians")
    times = ["torch's own", "paged", "contiguous"]
    if only != "prefill":
        contexts = [256, 1024, 4096, 32768] if gpu else [64, 256, 1024]
        batches = [1, 8, 64] if gpu else [1, 8, 32]
        loads = [
            (b, c, kind) for b in batches for c in contexts for kind in ("equal", "ragged") if b > 1 or kind == "equal"
        ]
        print_table(
            ["decode: batch", "context", "lengths", *times],
            (
                [str(b), str(c), kind, *measured(Load([c] * b if kind == "equal" else ragged(b, c), 1))]
                for b, c, kind in loads
                if b * c <= 64 * 4096
            ),
        )
    if only != "decode":
        spans = [(256, 256), (256, 4096), (2048, 2048), (2048, 32768)] if gpu else [(64, 64), (16, 512), (256, 1024)]
        print_table(
            ["prefill: batch", "new tokens", "context", *times],
            (
                [str(b), str(new), str(context), *measured(Load([context] * b, new))]
                for b in (1, 4)
                for new, context in spans
            ),
        )


if __name__ == "__main__":
    main()
