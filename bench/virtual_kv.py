"""KV that is contiguous in virtual memory: is it right, what mapping costs, how much of it is hidden, what is wasted.

    python bench/virtual_kv.py [--device cpu|cuda] [--only check|calls|serving|attention]

It checks first, and ends there if anything is wrong: contents under random growth while pages move between slots,
attention against plain tensors, an exhausted budget, memory given back. Then three tables, in the shapes of
SmolLM2-135M (30 layers, 3 KV heads of 64):

calls      the driver's calls alone, on an idle device and (CUDA) while the device computes.
serving    a ragged load (log-normal lengths like ShareGPT's, seeded), with matrix products in the model's place: time
           in the driver, what of it callers did not wait for, what their calls take of an iteration; and the share
           of memory wasted, by pages of a request over all layers, by tensors of their own for each layer's keys and
           values with the same pages, by paging with 16 tokens a page, and by reserving the longest length.
attention  decode and prefill of one layer, in turn over several layers: virtually contiguous, a plain tensor, paged.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from timing import print_table

from accel.attention.contiguous import contiguous_decode, contiguous_prefill
from accel.attention.paged import paged_decode, paged_prefill
from accel.kernels.kv_write import kv_write
from accel.memory.page_driver import PageDriver
from accel.memory.paged_kv import PagedKV
from accel.memory.virtual_kv import KVFull, VirtualKV, open_driver

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64
TOKENS_A_PAGE = 16  # of the paged cache
MIB = 1 << 20
LAYERS_CHECKED = (0, LAYERS // 2, LAYERS - 1)


@dataclass(frozen=True)
class Scale:
    """How much a device is asked for."""

    dtype: torch.dtype
    slots: int
    max_length: int
    requests: int
    budget_bytes: int
    page_bytes: tuple[int, ...]
    contexts: tuple[int, ...]
    batch: int  # of attention
    layers_timed: int  # of attention, so many that none stays in a GPU's L2 cache
    products: int  # square matrix products in a model's place
    product_size: int


SCALES = {
    "cpu": Scale(torch.float32, 8, 2048, 24, 512 * MIB, (256 << 10, 2 * MIB), (256, 1024), 4, 3, 1, 512),
    "cuda": Scale(
        torch.bfloat16,
        128,
        32768,
        1024,
        4 << 30,
        (2 * MIB, 4 * MIB),
        (256, 1024, 4096, 16384, 32768),
        16,
        LAYERS,
        8,
        4096,
    ),
}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def require(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"WRONG: {message}")


# Is it right?


def check(device: str, scale: Scale) -> None:
    free_before = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    tokens, moved = check_contents(device, scale)
    print(f"contents: {tokens} tokens read back as written, while {moved} pages came from other slots")
    print(f"attention: largest difference from plain tensors {check_attention(device, scale):.1e}")
    check_budget(device, scale)
    print("budget: exhausted, told, and usable again")
    if device == "cuda":
        torch.cuda.empty_cache()
        lost = free_before - torch.cuda.mem_get_info()[0]
        require(lost < 256 * MIB, f"{lost / MIB:.0f} MiB did not come back")  # libraries keep workspaces
        print(f"memory: {lost / MIB:.0f} MiB less free than before")


def check_contents(device: str, scale: Scale) -> tuple[int, int]:
    """Grow, prefetch and free at random in a quarter of the memory needed, never waiting for the device in between.

    Every token of a sequence holds the sequence's number; what differs is counted on the device and read at the end.
    """
    draw = random.Random(0)
    slots, longest = 8, 600
    driver = open_driver(torch.device(device))
    unmap, moved = driver.unmap, []
    driver.unmap = lambda address: (moved.append(address), unmap(address))
    kv = open_kv(device, scale, slots, longest, 2 * longest, driver)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    lengths, names = [0] * slots, [0] * slots
    read = started = unused = 0
    for _ in range(600):
        slot = draw.randrange(slots)
        if lengths[slot] and draw.random() < 0.2:
            for layer in LAYERS_CHECKED:
                for cache in (kv.keys(layer), kv.values(layer)):
                    wrong += (cache[slot, : lengths[slot]] != names[slot]).sum()
            read += lengths[slot]
            kv.free(slot)
            lengths[slot] = 0
            continue
        if not lengths[slot]:
            started += 1
            names[slot] = started % 200 + 1  # exact in bfloat16
        length = min(longest, lengths[slot] + draw.choice((1, 1, 30, 200)))
        try:
            kv.grow(slot, length)
        except KVFull:
            unused += 1
            continue
        new = length - lengths[slot]
        rows = torch.arange(lengths[slot], length, device=device) + slot * kv.rows
        contents = torch.full((new, KV_HEADS, HEAD_DIM), float(names[slot]), dtype=scale.dtype, device=device)
        for layer in LAYERS_CHECKED:
            kv_write(contents, contents, kv.keys(layer), kv.values(layer), rows)
        lengths[slot] = length
        kv.prefetch(slot, length + draw.choice((1, 100)))
    require(int(wrong) == 0, f"{int(wrong)} elements were not what was written")
    require(bool(read and unused and moved), "nothing was read back, the budget never ran out, or no page moved")
    pages_moved = len(moved)
    kv.close()
    return read, pages_moved


def check_attention(device: str, scale: Scale) -> float:
    lengths = [1, 17, 200, 333]
    kv = open_kv(device, scale, 4, 400, 4 * 400)
    keys, values = torch.randn(2, 4, 400, KV_HEADS, HEAD_DIM, device=device).to(scale.dtype)
    for slot, length in enumerate(lengths):
        kv.grow(slot, length)
        kv.keys(7)[slot, :length] = keys[slot, :length]
        kv.values(7)[slot, :length] = values[slot, :length]
    slots, counts = torch.arange(4, device=device), torch.tensor(lengths, dtype=torch.int32, device=device)
    q = torch.randn(4, HEADS, HEAD_DIM, device=device).to(scale.dtype)
    starts = torch.arange(5, dtype=torch.int32, device=device)
    scaling = HEAD_DIM**-0.5
    worst = 0.0
    for ours, plain in (
        (
            contiguous_decode(q, kv.keys(7), kv.values(7), slots, counts, scaling),
            contiguous_decode(q, keys, values, slots, counts, scaling),
        ),
        (
            contiguous_prefill(q, kv.keys(7), kv.values(7), slots, starts, counts, scaling),
            contiguous_prefill(q, keys, values, slots, starts, counts, scaling),
        ),
    ):
        require(bool(ours.isfinite().all()), "attention is not finite")
        worst = max(worst, float((ours.float() - plain.float()).abs().max()))
    kv.close()
    require(worst < 1e-6, f"attention differs by {worst:.1e}")
    return worst


def check_budget(device: str, scale: Scale) -> None:
    kv = open_kv(device, scale, 3, 1000, 2000)
    for slot in (0, 1):
        kv.grow(slot, 1000)
    try:
        kv.grow(2, 1000)
    except KVFull:
        pass
    else:
        require(False, "more was mapped than the budget holds")
    require(kv.bytes_mapped <= kv.budget_bytes, "more is mapped than the budget holds")
    kv.free(0)
    kv.grow(2, 1000)
    kv.keys(0)[2, :1000] = 1
    wait(device)
    kv.close()


def open_kv(
    device: str, scale: Scale, slots: int, longest: int, budget_tokens: int, driver: PageDriver | None = None
) -> VirtualKV:
    """With memory for `budget_tokens` tokens, and one page more a slot."""
    driver = driver or open_driver(torch.device(device))
    budget = budget_tokens * LAYERS * 2 * KV_HEADS * HEAD_DIM * scale.dtype.itemsize + slots * driver.page_bytes
    return VirtualKV(LAYERS, slots, longest, KV_HEADS, HEAD_DIM, scale.dtype, device, budget, driver=driver)


# What do the driver's calls cost?


def calls_table(device: str, scale: Scale) -> None:
    def rows() -> Iterable[list[str]]:
        for page_bytes in scale.page_bytes:
            for busy in (False, True) if device == "cuda" else (False,):
                yield call_row(device, scale, page_bytes, busy)

    print("\nMicroseconds a page, medians of 20")
    together = [f"map {count} at once" for count in COUNTS]
    print_table(["page", "device", "create", *together, "unmap", "release", "still busy after"], rows())


COUNTS = (1, 4, 16)


def call_row(device: str, scale: Scale, page_bytes: int, busy: bool) -> list[str]:
    driver = open_driver(torch.device(device), page_bytes)
    address = driver.reserve(max(COUNTS) * page_bytes)
    pages, create = [], []
    for _ in range(max(COUNTS)):
        create.append(microseconds(lambda: pages.append(driver.create())))
    mapping: dict[int, list[float]] = {count: [] for count in COUNTS}
    unmap, still_busy = [], True
    work = Work(scale, device)
    for _ in range(20):
        for count in COUNTS:
            if busy:
                for _ in range(10):
                    work.issue()
            mapping[count].append(microseconds(lambda count=count: driver.map(address, pages[:count])) / count)
            for i in range(count):
                unmap.append(microseconds(lambda i=i: driver.unmap(address + i * page_bytes)))
            if busy:
                still_busy = still_busy and not torch.cuda.current_stream().query()
            wait(device)
    release = [microseconds(lambda page=page: driver.release(page)) for page in pages]
    driver.free(address, max(COUNTS) * page_bytes)
    medians = [statistics.median(times) for times in (create, *mapping.values(), unmap, release)]
    after = ("yes" if still_busy else "no") if busy else "-"
    return [size(page_bytes), "busy" if busy else "idle", *(f"{value:.1f}" for value in medians), after]


def microseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e6


class Work:
    """Matrix products that stand in for a model's iteration."""

    def __init__(self, scale: Scale, device: str) -> None:
        self._matrix = torch.randn(scale.product_size, scale.product_size, device=device).to(scale.dtype) / 64
        self._products = scale.products
        self._out = torch.empty_like(self._matrix)

    def issue(self) -> None:
        for _ in range(self._products):
            torch.mm(self._matrix, self._matrix, out=self._out)

    def wait(self) -> None:
        float(self._out[0, 0])


# A ragged load


@dataclass
class Running:
    slot: int
    length: int  # tokens that the cache holds
    left: int  # tokens to be generated


@dataclass
class Served:
    """Of one run of the load."""

    iterations: int = 0
    seconds: float = 0.0
    growing: list[float] = field(default_factory=list)  # milliseconds of an iteration in `grow` and `prefetch`
    bytes_by_kind: dict[str, int] = field(default_factory=dict)  # summed over iterations
    mapping: float = 0.0
    hidden: float = 0.0


def load(scale: Scale) -> list[tuple[int, int]]:
    """(prompt, output) tokens of each request; medians 90 and 130, as ragged as ShareGPT's."""
    draw = random.Random(0)
    longest = scale.max_length // 2
    return [
        (
            min(longest, max(4, round(draw.lognormvariate(4.5, 1.1)))),
            min(longest, max(4, round(draw.lognormvariate(4.9, 0.8)))),
        )
        for _ in range(scale.requests)
    ]


def serve(device: str, scale: Scale, page_bytes: int, ahead: bool) -> Served:
    """Iteration-level batching of the load, in order; a request is admitted if its longest length is sure to fit."""
    kv = VirtualKV(
        LAYERS,
        scale.slots,
        scale.max_length,
        KV_HEADS,
        HEAD_DIM,
        scale.dtype,
        device,
        scale.budget_bytes,
        page_bytes,
    )
    work, waiting, running = Work(scale, device), load(scale)[::-1], []
    promised: dict[int, int] = {}  # pages, by slot
    token = torch.ones(scale.max_length, KV_HEADS, HEAD_DIM, dtype=scale.dtype, device=device)
    served, started = Served(), time.perf_counter()
    while waiting or running:
        began = time.perf_counter()
        new = []
        while waiting and (slot := kv.next_slot()) is not None:
            prompt, output = waiting[-1]
            pages = kv.pages_for(prompt + output)
            if sum(promised.values()) + pages > kv.budget_bytes // kv.page_bytes:
                break
            waiting.pop()
            promised[slot] = pages
            kv.grow(slot, prompt)
            new.append(Running(slot, prompt, output))
        for sequence in running:
            sequence.length += 1
            sequence.left -= 1
            kv.grow(sequence.slot, sequence.length)
        growing = time.perf_counter() - began
        for sequence in new:
            kv.keys(0)[sequence.slot, : sequence.length] = token[: sequence.length]
        if running:
            rows = torch.tensor([sequence.slot * kv.rows + sequence.length - 1 for sequence in running], device=device)
            kv_write(token[: len(rows)], token[: len(rows)], kv.keys(0), kv.values(0), rows)
        running += new
        work.issue()
        began = time.perf_counter()
        if ahead:  # the iteration runs; what the next one needs is known
            for sequence in running:
                kv.prefetch(sequence.slot, sequence.length + 1)
        served.growing.append((growing + time.perf_counter() - began) * 1e3)
        work.wait()
        count(served.bytes_by_kind, kv, [sequence.length for sequence in running], scale)
        for sequence in [sequence for sequence in running if sequence.left <= 0]:
            kv.free(sequence.slot)
            del promised[sequence.slot]
            running.remove(sequence)
        served.iterations += 1
    served.seconds = time.perf_counter() - started
    served.mapping, served.hidden = kv.seconds_mapping, kv.seconds_hidden
    kv.close()
    return served


def count(sums: dict[str, int], kv: VirtualKV, lengths: list[int], scale: Scale) -> None:
    """Add what sequences of these lengths take, by kind of memory."""
    layer_bytes = kv.token_bytes // (2 * LAYERS)
    kinds = {
        "used": kv.bytes_used(lengths),
        "in use": kv.bytes_needed,
        "mapped": kv.bytes_mapped,
        "unsliced": 2 * LAYERS * sum(-(-length * layer_bytes // kv.page_bytes) for length in lengths) * kv.page_bytes,
        "paged": sum(-(-length // TOKENS_A_PAGE) for length in lengths) * TOKENS_A_PAGE * kv.token_bytes,
        "reserved": len(lengths) * scale.max_length * kv.token_bytes,
    }
    for kind, nbytes in kinds.items():
        sums[kind] = sums.get(kind, 0) + nbytes


def serving_tables(device: str, scale: Scale) -> None:
    lengths = [prompt + output for prompt, output in load(scale)]
    print(
        f"\n{scale.requests} requests of {min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} on "
        f"average, {scale.slots} slots of {scale.max_length}, {scale.budget_bytes / MIB:.0f} MiB"
    )
    runs = [
        (page_bytes, ahead, serve(device, scale, page_bytes, ahead))
        for page_bytes in scale.page_bytes
        for ahead in (False, True)
    ]

    def times() -> Iterable[list[str]]:
        for page_bytes, ahead, run in runs:
            growing = sorted(run.growing)
            yield [
                size(page_bytes),
                "one iteration ahead" if ahead else "when needed",
                f"{run.seconds / run.iterations * 1e3:.2f}",
                f"{run.mapping * 1e3:.1f}",
                f"{run.hidden / run.mapping:.0%}",
                f"{statistics.mean(growing):.3f}",
                f"{growing[int(0.99 * len(growing))]:.3f}",
                f"{sum(growing) / run.seconds / 10:.2f}%",
            ]

    def memory() -> Iterable[list[str]]:
        for page_bytes, ahead, run in runs:
            if ahead:
                used = run.bytes_by_kind["used"]
                yield [
                    size(page_bytes),
                    f"{used / run.iterations / MIB:.1f}",
                    *(f"{1 - used / nbytes:.1%}" for kind, nbytes in run.bytes_by_kind.items() if kind != "used"),
                ]

    print_table(
        ["page", "mapped", "ms an iteration", "ms in the driver", "hidden", "ms in calls, mean", "p99", "of all time"],
        times(),
    )
    print(
        "\nWaste: 1 - bytes used / bytes taken, over all iterations; 'mapped' counts pages that freed slots keep "
        "and those ahead of need"
    )
    print_table(
        ["page", "MiB used, mean", "in use", "mapped", "a tensor each layer", "16 a page", "reserved"],
        memory(),
    )


# Attention over it


def attention_table(device: str, scale: Scale) -> None:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"\n{name}: microseconds a layer, {scale.batch} sequences; prefill of 256 new tokens of one")

    def rows() -> Iterable[list[str]]:
        for context in scale.contexts:
            yield attention_row(device, scale, context)

    kinds = ("virtual", "plain", "paged")
    header = ["context", *(f"{step} {kind}" for step in ("decode", "prefill") for kind in kinds)]
    print_table(header, rows())


def attention_row(device: str, scale: Scale, context: int) -> list[str]:
    batch, new, scaling = scale.batch, min(256, context), HEAD_DIM**-0.5
    pages = -(-context // TOKENS_A_PAGE)
    q = torch.randn(batch, HEADS, HEAD_DIM, device=device).to(scale.dtype)
    queries = torch.randn(new, HEADS, HEAD_DIM, device=device).to(scale.dtype)
    slots = torch.arange(batch, device=device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    starts = torch.tensor([0, new], dtype=torch.int32, device=device)
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0))
    tables = order.view(batch, pages).to(torch.int32).to(device)

    def cells(caches: list[tuple[torch.Tensor, torch.Tensor]], where: torch.Tensor, paged: bool) -> list[float]:
        decode, prefill = (paged_decode, paged_prefill) if paged else (contiguous_decode, contiguous_prefill)

        caches = caches[: scale.layers_timed]

        def all_decode() -> None:
            for keys, values in caches:
                decode(q, keys, values, where, lengths, scaling)

        def all_prefill() -> None:
            for keys, values in caches:
                prefill(queries, keys, values, where[:1], starts, lengths[:1], scaling)

        return [median_us(device, all_decode) / len(caches), median_us(device, all_prefill) / len(caches)]

    kv = open_kv(device, scale, batch, context, batch * context)
    for slot in range(batch):
        kv.grow(slot, context)
        for layer in range(LAYERS):
            kv.keys(layer)[slot, :context] = 1
            kv.values(layer)[slot, :context] = 1
    virtual = cells([(kv.keys(layer), kv.values(layer)) for layer in range(LAYERS)], slots, False)
    kv.close()
    both = torch.ones(LAYERS, 2, batch, context, KV_HEADS, HEAD_DIM, dtype=scale.dtype, device=device)
    plain = cells([(layer[0], layer[1]) for layer in both], slots, False)
    del both
    cache = PagedKV(LAYERS, batch * pages, TOKENS_A_PAGE, KV_HEADS, HEAD_DIM, scale.dtype, device)
    paged = cells(list(zip(cache.keys, cache.values, strict=True)), tables, True)
    columns = zip(virtual, plain, paged, strict=True)
    return [str(context), *(f"{value:.0f}" for step in columns for value in step)]


def median_us(device: str, action: Callable[[], object]) -> float:
    """From the first launch to the end; on CUDA in a graph, so that launching does not count."""
    action()
    run = action
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        run = graph.replay
    times = []
    for _ in range(20 if device == "cuda" else 3):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= MIB else f"{nbytes >> 10} KiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=["check", "calls", "serving", "attention"])
    arguments = parser.parse_args()
    device, scale = arguments.device, SCALES[arguments.device]
    check(device, scale)
    for name, table in (("calls", calls_table), ("serving", serving_tables), ("attention", attention_table)):
        if arguments.only in (None, name):
            table(device, scale)


if __name__ == "__main__":
    main()
