"""Serving of the language model under a ragged load, each claim beside what it is compared with, in one run.

    generate     continuous batching against transformers: generate in batches on a CPU, its own continuous batching on
                 a GPU
    static       continuous against static batching, at a p99 time between tokens that is not higher
    waste        share of the key-value memory held that no token fills: paged, virtually contiguous, reserved
    quarter      a pool of a quarter of what the load needs: recompute against swap, and the same tokens
    prefix       time to the first token behind 400 shared tokens, found in memory or not; hit rates of admission orders

On a CPU the clock counts the time that one core gave to the process, so that what else runs does not matter, and the
load is a small one. `waste` and the hit rates are decisions of the scheduler, at a GPU's size of load: no model runs.

    python bench/llm_serving.py [PART ...] [--device cpu] [--dtype float32] [--requests 16] [--rounds 2]
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from llm_load import (
    Asked,
    Clock,
    Run,
    best,
    clock_of,
    engine_of,
    generate,
    generate_continuously,
    models,
    plan_of,
    ragged,
    requests_of,
    rounds,
    serve,
)
from transformers import LlamaForCausalLM

from cache.prefix.pages import PagePool
from cache.prefix.radix import RadixTree
from models.llm.loading import LanguageModel
from service.llm.request import LlmRequest, SamplingParams
from service.llm.scheduler import Policy, Scheduler
from service.llm.spaces import KvSpace, PagedSpace, ReservedSpace, VirtualSpace

PAGE = 16  # tokens


@dataclass(frozen=True)
class Size:
    """How large the load is, and the batch."""

    requests: int
    prompt: int  # median lengths, tokens
    answer: int
    most: int
    running: int
    batch_tokens: int

    def load(self, model: LanguageModel) -> list[Asked]:
        return ragged(self.requests, model.config.vocab_size, 5, self.prompt, self.answer, self.most)


def pages_of(load: list[Asked]) -> int:
    return sum(-(-(len(asked.prompt) + asked.answer) // PAGE) for asked in load)


def against_transformers(model: LanguageModel, network: LlamaForCausalLM, size: Size, clock: Clock, count: int) -> None:
    load = size.load(model)
    plan = plan_of(model, min(pages_of(load), 40000), prefixes=False)
    assembly = engine_of(model, plan, size.running, size.batch_tokens)
    contenders: dict[str, Callable[[], Run]] = {"headstart": lambda: serve(assembly.engine, load, clock)}
    if network.device.type == "cuda":
        contenders["transformers generate_batch"] = lambda: generate_continuously(network, load, clock)
    else:
        contenders["transformers generate"] = lambda: generate(network, load, size.running, clock)
    runs = rounds(contenders, count)
    table(f"{len(load)} requests, batches of up to {size.running}", runs)
    ours, theirs = runs.values()
    ratios = [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]
    same = sum(ours[0].tokens[str(index)] == theirs[0].tokens[str(index)] for index in range(len(load)))
    print(f"\n{statistics.median(ratios):.2f} times the output tokens/s (median of {len(ratios)} rounds: ", end="")
    print(f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}); {same} of {len(load)} answers are equal\n", flush=True)


def against_static(model: LanguageModel, size: Size, clock: Clock, count: int) -> None:
    """A quarter of the load at once, so that others wait. Prompts are read in chunks so small that those who write
    meanwhile hardly notice. The static batch is the best of those whose p99 time between tokens is no higher."""
    load = size.load(model)
    plan = plan_of(model, min(pages_of(load), 40000), prefixes=False)
    running = size.requests // 4

    def contender(running: int, tokens: int, mode: str) -> Callable[[], Run]:
        return lambda: serve(engine_of(model, plan, running, tokens, mode=mode).engine, load, clock)

    contenders = {f"continuous, {running}": contender(running, 4 * running, "continuous")}
    for others in (running // 2, running, 2 * running):
        contenders[f"static, {others}"] = contender(others, 4 * running, "static")
    runs = rounds(contenders, count)
    table("mode, sequences at once", runs)
    ours, *static = (best(of_one) for of_one in runs.values())
    within = [run for run in static if run.p99 <= ours.p99]
    rival = max(within, key=lambda run: run.rate) if within else min(static, key=lambda run: run.p99)
    which = "the best static batch within its p99" if within else "the static batch of the lowest p99, which is higher"
    print(f"\n{ours.rate / rival.rate:.2f} times the output tokens/s of {which}\n", flush=True)


def table(kind: str, runs: dict[str, list[Run]]) -> None:
    print(f"| {kind} | output tokens | seconds | output tokens/s | p99 between tokens, ms | median to the first, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, of_one in runs.items():
        run = best(of_one)
        gaps = f"{1000 * run.p99:.0f} | {statistics.median(run.first.values()):.2f}" if run.gaps else "|"
        print(f"| {name} | {run.output} | {run.seconds:.1f} | {run.rate:.1f} | {gaps} |", flush=True)


END = 1  # the token that ends an answer where no model runs


def steps(scheduler: Scheduler, answers: dict[str, int]) -> Iterator[None]:
    """Run a scheduler without a model, until every answer has its length."""
    while (batch := scheduler.schedule(0.0)) is not None:
        ends = [sequence.generated + 1 == answers[sequence.request.id] for sequence in batch.outputs]
        scheduler.commit(batch, [END if end else 0 for end in ends])
        scheduler.collect()
        yield


def waste() -> None:
    """Any answer might be as long as the longest, so that is what is reserved for each."""
    load = ragged(256, 49152, 5)
    answers = {str(index): asked.answer for index, asked in enumerate(load)}
    longest = max(answers.values())
    token_bytes, huge = 30 * 2 * 3 * 64 * 2, 2 << 20  # SmolLM2-135M in bfloat16; the page that a GPU maps
    tokens = 48 * (longest + 1024)

    def mapped(length: int) -> int:
        return -(-length * token_bytes // huge)

    pool, reserved = PagePool(tokens // PAGE, PAGE), PagePool(tokens // PAGE, PAGE)
    spaces: dict[str, tuple[KvSpace, Callable[[list[int]], int]]] = {
        "paged, 16 tokens a page": (PagedSpace(pool), lambda _: (pool.pages - pool.free) * PAGE * token_bytes),
        "virtually contiguous, 2 MiB a page": (
            VirtualSpace(256, 4096, tokens * token_bytes // huge, mapped),
            lambda lengths: sum(map(mapped, lengths)) * huge,
        ),
        "reserved for the longest answer": (
            ReservedSpace(reserved),
            lambda _: (reserved.pages - reserved.free) * PAGE * token_bytes,
        ),
    }
    print("| memory | of what is held, wasted | sequences at once | steps |\n| --- | --- | --- | --- |")
    for name, (space, held_by) in spaces.items():
        scheduler = Scheduler(space, Policy(max_running=256, max_batch_tokens=2048), 4096, frozenset({END}))
        for request in requests_of(load):
            params = SamplingParams(temperature=0.0, max_tokens=longest)
            scheduler.add(LlmRequest(id=request.id, tokens=request.tokens, params=params), 0.0)
        used, held, running = 0, 0, []
        for _ in steps(scheduler, answers):
            sequences = [sequence for job in scheduler.jobs.values() for sequence in job.sequences]
            lengths = [sequence.computed for sequence in sequences if sequence.computed]
            used, held = used + sum(lengths) * token_bytes, held + held_by(lengths)
            running.append(len(lengths))
        print(f"| {name} | {100 * (1 - used / held):.1f}% | {np.mean(running):.0f} | {len(running)} |", flush=True)
    print()


def quarter(model: LanguageModel, size: Size, clock: Clock, count: int) -> None:
    """What the load needs is the most pages that it holds at once where there are enough."""
    load = size.load(model)
    ample = engine_of(model, plan_of(model, pages_of(load), prefixes=False), size.running, size.batch_tokens)
    pool = ample.pool
    assert pool is not None
    held: list[int] = []
    whole = serve(ample.engine, load, clock, lambda: held.append(pool.pages - pool.free))
    longest = max(-(-(len(asked.prompt) + asked.answer) // PAGE) for asked in load)
    pages = max(longest, max(held) // 4)
    preemptions: dict[str, int] = {}

    def contender(preemption: str) -> Callable[[], Run]:
        def run() -> Run:
            plan = plan_of(model, pages, host_pages=max(held), prefixes=False)
            assembly = engine_of(model, plan, size.running, size.batch_tokens, preemption=preemption)
            result = serve(assembly.engine, load, clock)
            preemptions[preemption] = assembly.scheduler.preemptions
            return result

        return run

    runs = rounds({name: contender(name) for name in ("recompute", "swap")}, count)
    table(f"{pages} pages of the {max(held)} needed", {"as many as needed": [whole]} | runs)
    for name, of_one in runs.items():
        same = sum(of_one[0].tokens[str(index)] == whole.tokens[str(index)] for index in range(len(load)))
        print(f"\n{name}: {preemptions[name]} preemptions, {same} of {len(load)} answers are the same", flush=True)
    print()


def prefix(model: LanguageModel, size: Size, clock: Clock) -> None:
    """One request at a time behind 400 tokens: new ones, or the same as before."""
    rng = random.Random(2)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(100, model.config.vocab_size - 100) for _ in range(count)]

    assembly = engine_of(model, plan_of(model, 2000), size.running, 512)
    shared, times = tokens(400), {"not in memory": list[float](), "in memory": list[float]()}
    serve(assembly.engine, [Asked(shared + tokens(15), 2)], clock)
    for _ in range(8):
        for name, begin in (("not in memory", tokens(400)), ("in memory", shared)):
            run = serve(assembly.engine, [Asked(begin + tokens(15), 2)], clock)
            times[name].append(run.first["0"])
    miss, hit = (statistics.median(values) for values in times.values())
    print("| 400 shared tokens of 415 | median time to the first token, ms |\n| --- | --- |")
    print(f"| not in memory | {1000 * miss:.0f} |\n| in memory | {1000 * hit:.0f} |\n\n{miss / hit:.1f} times lower\n")
    admission()


def admission() -> None:
    """Hit rates, no model: the rewriter's load, and eight prefixes of 400 tokens in memory for two and a half."""
    rng = random.Random(3)
    prefixes = [tuple(rng.randrange(1000) for _ in range(400)) for _ in range(8)]
    kinds = {
        "rewrites: one prefix, 8 to 25 tokens of the user's": (prefixes[:1], 4000, 400),
        "eight prefixes in turn, memory for few": (prefixes, 90, 400),
    }
    print("| load | order | of the prompts' tokens, found | steps |\n| --- | --- | --- | --- |")
    for name, (begins, pages, count) in kinds.items():
        prompts = [
            begins[index % len(begins)] + tuple(rng.randrange(1000, 2000) for _ in range(rng.randint(8, 25)))
            for index in range(count)
        ]
        for order in ("fcfs", "lpm"):
            pool = PagePool(pages, PAGE)
            space = PagedSpace(pool, RadixTree(pool))
            policy = Policy(max_running=8, max_batch_tokens=512, order=order)  # type: ignore[arg-type]
            scheduler = Scheduler(space, policy, 1024, frozenset({END}))
            answers = {}
            for index, prompt in enumerate(prompts):
                answers[str(index)] = rng.randint(10, 30)
                params = SamplingParams(max_tokens=30)
                scheduler.add(LlmRequest(id=str(index), tokens=prompt, params=params), 0.0)
            taken = sum(1 for _ in steps(scheduler, answers))
            found = scheduler.cached_tokens / scheduler.prompt_tokens
            print(f"| {name} | {order} | {100 * found:.1f}% | {taken} |", flush=True)
    print()


PARTS = ("generate", "static", "waste", "quarter", "prefix")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, help="of the load; 16 on a CPU, 256 on a GPU")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    parts = args.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    small = args.device == "cpu"
    size = (
        Size(args.requests or 16, 32, 40, 160, 8, 40)
        if small
        else Size(args.requests or 256, 160, 200, 1024, 256, 2048)
    )
    clock, unit = clock_of(args.device)
    model, network = models(args.dtype, args.device)
    print(f"{args.device}, {args.dtype}, torch {torch.__version__}, times in {unit}\n")
    for part in parts:
        print(f"## {part}\n")
        if part == "generate":
            against_transformers(model, network, size, clock, args.rounds)
        elif part == "static":
            against_static(model, size, clock, args.rounds)
        elif part == "waste":
            waste()
        elif part == "quarter":
            quarter(model, size, clock, args.rounds)
        else:
            prefix(model, size, clock)


if __name__ == "__main__":
    main()
