"""Attention as its definition says, one query head at a time in float64, over caches laid out at random."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported


class Shape(NamedTuple):
    """Heads of queries, heads of keys and values, and their dimension."""

    heads: int
    kv_heads: int
    dim: int


SHAPES = [Shape(9, 3, 64), Shape(4, 4, 32), Shape(8, 1, 80), Shape(5, 1, 16), Shape(2, 2, 128), Shape(34, 2, 24)]
# Every shape, and every dtype at the first.
KINDS = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[0], torch.bfloat16), (SHAPES[0], torch.float16)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


@dataclass
class Case:
    """Sequences with their keys and values [L, Hkv, D], and queries [n, Hq, D] that are the last of each."""

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scale: float

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor([len(k) for k in self.keys], dtype=torch.int32)

    @property
    def starts(self) -> torch.Tensor:
        counts = torch.tensor([0] + [len(q) for q in self.queries])
        return counts.cumsum(0).to(torch.int32)

    @property
    def q(self) -> torch.Tensor:
        return torch.cat(self.queries)

    def expected(self) -> torch.Tensor:
        """[T, Hq, D] in float64."""
        return torch.cat(
            [attention(*tensors, self.scale) for tensors in zip(self.queries, self.keys, self.values, strict=True)]
        )


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[n, Hq, D]: query i is at position L - n + i and sees positions up to its own; zeros if none."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for i in range(len(q)):
        seen = len(k) - len(q) + i + 1
        for head in range(q.shape[1]):
            kv_head = head * k.shape[1] // q.shape[1]
            if seen > 0:
                weights = torch.exp(scale * (k[:seen, kv_head] @ q[i, head]))
                out[i, head] = weights @ v[:seen, kv_head] / weights.sum()
    return out


def case(shape: Shape, spans: list[tuple[int, int]], dtype: torch.dtype, seed: int = 0) -> Case:
    """spans: (new tokens, tokens of context) of each sequence."""
    generator = torch.Generator().manual_seed(seed)

    def random(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, shape.dim, generator=generator).to(dtype)

    return Case(
        [random(new, shape.heads) for new, _ in spans],
        [random(length, shape.kv_heads) for _, length in spans],
        [random(length, shape.kv_heads) for _, length in spans],
        1 / math.sqrt(shape.dim),
    )


def in_pages(c: Case, page_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """keys, values [N, S, Hkv, D] and tables [B, M]: pages in random order; NaN and wild pages where none may look."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-len(k) // page_size) for k in c.keys]
    pages = sum(counts) + 3
    order = torch.randperm(pages, generator=generator).tolist()
    tables = torch.full((len(counts), max(counts) + 2), 2**31 - 1, dtype=torch.int32)
    keys = torch.full((pages, page_size, *c.keys[0].shape[1:]), torch.nan, dtype=c.keys[0].dtype)
    values = keys.clone()
    for b, count in enumerate(counts):
        for place in range(count):
            page = order.pop()
            tables[b, place] = page
            part = slice(place * page_size, (place + 1) * page_size)
            keys[page, : len(c.keys[b][part])] = c.keys[b][part]
            values[page, : len(c.keys[b][part])] = c.values[b][part]
    return keys, values, tables


def in_slots(c: Case, room: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """keys, values [slots, Lmax, Hkv, D], strided as those of one layer among several, and slots [B]."""
    generator = torch.Generator().manual_seed(seed)
    count = len(c.keys) + 2
    slots = torch.randperm(count, generator=generator)[: len(c.keys)]
    memory = torch.full((count, room, 3, 2, *c.keys[0].shape[1:]), torch.nan, dtype=c.keys[0].dtype)
    keys, values = memory[:, :, 1, 0], memory[:, :, 1, 1]
    for b, slot in enumerate(slots.tolist()):
        keys[slot, : len(c.keys[b])] = c.keys[b]
        values[slot, : len(c.keys[b])] = c.values[b]
    return keys, values, slots


@contextmanager
def interpreted_bfloat16() -> Iterator[None]:
    """Lets Triton's interpreter multiply matrices of bfloat16, whose bit patterns it would take for integers.

    https://github.com/triton-lang/triton/issues/11584
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    with mock.patch.object(InterpreterBuilder, "create_dot", dot):
        yield
