"""A mixed batch through the layers of a cache: new keys and values are written, then every sequence is attended to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from accel.attention.batch import Attend, ContiguousAttend, PagedAttend
from accel.memory.paged_kv import PagedKV
from accel.memory.virtual_kv import VirtualKV
from tests.accel.naive_attention import DEVICE, TOLERANCE, Case, Shape, case

SHAPE = Shape(9, 3, 64)
LAYERS = 2
PAGE = 16
ROOM = 320

# The first `decodes` sequences have one new token; (new tokens, context) of each, the new ones included.
BATCHES = {
    "decodes": ([(1, 1), (1, 300), (1, 17)], 3),
    "prefills": ([(20, 20), (5, 40)], 0),
    "mixed": ([(1, 5), (1, 33), (16, 16), (1, 50), (7, 100)], 2),
    "one": ([(1, 1)], 0),
}

# From the layers' cases and the number of decodes: how to attend, a batch with two padded decodes in front.
Build = Callable[[list[Case], int], Attend]


def paged(layers: list[Case], decodes: int) -> Attend:
    c = layers[0]
    counts = [-(-len(k) // PAGE) for k in c.keys]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(0)).tolist()
    kv = PagedKV(LAYERS, len(order), PAGE, SHAPE.kv_heads, SHAPE.dim, c.q.dtype, DEVICE)
    tables = torch.zeros(len(counts) + 2, max(counts), dtype=torch.int32)
    slots = [-1, -1]
    for tensor in [*kv.keys, *kv.values]:
        tensor.fill_(torch.nan)
    for b, count in enumerate(counts):
        pages = [order.pop() for _ in range(count)]
        tables[b + 2, :count] = torch.tensor(pages)
        where = [pages[i // PAGE] * PAGE + i % PAGE for i in range(len(c.keys[b]))]
        slots += where[len(where) - len(c.queries[b]) :]
        for layer, other in enumerate(layers):
            write_prefix(kv.keys[layer], kv.values[layer], where, other, b)
    return PagedAttend(kv, tables.to(DEVICE), torch.tensor(slots, device=DEVICE), *padded(c), decodes + 2, c.scale)


def contiguous(layers: list[Case], decodes: int) -> Attend:
    c = layers[0]
    count = len(c.keys)
    kv = VirtualKV(
        LAYERS, count + 1, ROOM, SHAPE.kv_heads, SHAPE.dim, c.q.dtype, DEVICE, budget_bytes=(count + 1) * 2**22
    )
    rows = [0, 0, *torch.randperm(count + 1, generator=torch.Generator().manual_seed(0)).tolist()[:count]]
    room = kv.keys(0).shape[1]
    slots = [-1, -1]
    for b, slot in enumerate(rows[2:]):
        kv.grow(slot, len(c.keys[b]))
        where = [slot * room + i for i in range(len(c.keys[b]))]
        slots += where[len(where) - len(c.queries[b]) :]
        for layer, other in enumerate(layers):
            write_prefix(kv.keys(layer), kv.values(layer), where, other, b)
    addresses = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    return ContiguousAttend(kv, addresses, torch.tensor(slots, device=DEVICE), *padded(c), decodes + 2, c.scale)


def write_prefix(keys: torch.Tensor, values: torch.Tensor, where: list[int], c: Case, b: int) -> None:
    """What is in the cache before the batch: all but the new tokens of sequence b."""
    old = len(c.keys[b]) - len(c.queries[b])
    keys.view(-1, *keys.shape[2:])[where[:old]] = c.keys[b][:old].to(DEVICE)
    values.view(-1, *values.shape[2:])[where[:old]] = c.values[b][:old].to(DEVICE)


def padded(c: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """starts and lengths with two empty decodes in front."""
    starts = torch.cat([torch.tensor([0, 1]), c.starts + 2]).to(DEVICE, torch.int32)
    lengths = torch.cat([torch.tensor([0, 0]), c.lengths]).to(DEVICE, torch.int32)
    return starts, lengths


def new_tokens(c: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of a batch as slices of a fused projection, with two padded rows in front."""
    k = torch.cat([k[len(k) - len(q) :] for q, k in zip(c.queries, c.keys, strict=True)])
    v = torch.cat([v[len(v) - len(q) :] for q, v in zip(c.queries, c.values, strict=True)])
    fused = torch.cat([c.q, k, v], dim=1)
    fused = torch.cat([torch.full_like(fused[:1], 7.0).expand(2, -1, -1), fused]).to(DEVICE)
    q, k, v = fused.split([SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads], dim=1)
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [paged, contiguous])
@pytest.mark.parametrize("name", BATCHES)
def test_every_layer_attends_to_its_prefix_and_its_new_tokens(name: str, build: Build, dtype: torch.dtype) -> None:
    spans, decodes = BATCHES[name]
    layers = [case(SHAPE, spans, dtype, seed=layer) for layer in range(LAYERS)]
    attend = build(layers, decodes)
    for _ in range(2):  # a second forward pass over the same batch does the same
        for layer, c in enumerate(layers):
            got = attend(layer, *new_tokens(c))
            assert torch.equal(got[:2], torch.zeros_like(got[:2]))
            near = TOLERANCE[dtype]
            torch.testing.assert_close(got[2:].double().cpu(), c.expected(), rtol=near, atol=near)


def test_tensors_of_a_batch_may_change_between_forward_passes() -> None:
    """As those of a captured graph do."""
    kv = PagedKV(LAYERS, 4, PAGE, SHAPE.kv_heads, SHAPE.dim, torch.float32, DEVICE)
    tables = torch.tensor([[0], [0]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([0, -1], device=DEVICE)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    attend = PagedAttend(kv, tables, slots, starts, lengths, 2, SHAPE.dim**-0.5)
    c = case(SHAPE, [(1, 1), (1, 1)], torch.float32)
    q, k, v = c.q.to(DEVICE), torch.cat(c.keys).to(DEVICE), torch.cat(c.values).to(DEVICE)
    expected = v.repeat_interleave(3, dim=1)  # of a single token all weight is on itself
    for layer in range(LAYERS):
        got = attend(layer, q, k, v)
        torch.testing.assert_close(got[0], expected[0])
        assert not got[1].any()
    tables[1], lengths[1], slots[1] = 3, 1, 3 * PAGE
    for layer in range(LAYERS):
        torch.testing.assert_close(attend(layer, q, k, v), expected)


def test_more_decodes_than_sequences_are_refused() -> None:
    kv = PagedKV(1, 1, PAGE, 1, 8, torch.float32, DEVICE)
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="decodes: 2; allowed: 0 to the number of sequences, 1"):
        PagedAttend(kv, none, none, none, torch.ones(1), 2, 1.0)
