"""The language-model scheduler and its prefix tree, without a model: what they cost, and what order of admission gains.

python bench/prefix_cache.py

Three tables in Markdown; the times of the first two are of the processor, so that other work beside does not count:

- a step of the scheduler while 256 sequences generate, with no one waiting, and with 1,000 requests that have a known
  prefix of 200 tokens waiting for memory.
- the radix tree on 10,000 prompts of 200 to 1,000 tokens: one half shares one of 100 beginnings of 400 tokens, the rest
  is of conversations of up to 8 turns, each beginning with all of the last one.
- 4,000 requests, 19 of 20 with one of 128 beginnings of 400 tokens, 20 to 60 tokens of their own, 16 to 64 tokens of
  answer, in memory for about 40 such beginnings: the share of prompt tokens that were found, by
  longest prefix first and first come first served. Time is simulated: a step takes 5 ms, and 0.05 ms for each token.
  Requests arrive at random, in times of more and of less than can be served. The checks: every request ends, and every
  page comes back.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cache.prefix.pages import PagePool
from cache.prefix.radix import RadixTree
from service.llm.request import LlmRequest, SamplingParams
from service.llm.scheduler import Policy, Scheduler
from service.llm.spaces import PagedSpace

PAGE = 16  # tokens
VOCABULARY = 49152
SEQUENCES = 256
PROMPTS = 10_000
REQUESTS = 4000
STEP_S, TOKEN_S = 5e-3, 5e-5  # of simulated time

Tokens = tuple[int, ...]


def some_tokens(rng: random.Random, count: int) -> Tokens:
    return tuple(rng.choices(range(VOCABULARY), k=count))


def ask(number: int, tokens: Tokens, max_tokens: int) -> LlmRequest:
    return LlmRequest(id=str(number), tokens=tokens, params=SamplingParams(max_tokens=max_tokens))


def figures(seconds: list[float], unit: float) -> str:
    """Median and 99th percentile."""
    return f"{statistics.median(seconds) / unit:.2f} | {statistics.quantiles(seconds, n=100)[98] / unit:.2f}"


def time_steps() -> None:
    print("| 256 sequences generate | schedule ms, median | p99 | commit ms, median | p99 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for waiting in (0, 1000):
        schedule, commit = steps(waiting)
        print(f"| {waiting} requests wait | {figures(schedule, 1e-3)} | {figures(commit, 1e-3)} |")


def steps(waiting: int) -> tuple[list[float], list[float]]:
    """Seconds of schedule and of commit, while all sequences generate; those that wait find a seat, but no memory."""
    rng = random.Random(0)
    prompt, answer = 200, 40
    pages = SEQUENCES * (-(-(prompt + answer) // PAGE) + 1)
    pool = PagePool(pages, PAGE)
    policy = Policy(max_running=SEQUENCES + 1, max_batch_tokens=2048, ageing_s=1e9)
    scheduler = Scheduler(PagedSpace(pool, RadixTree(pool)), policy, 8192)
    load = [some_tokens(rng, prompt) for _ in range(SEQUENCES)]
    for number, tokens in enumerate(load):
        scheduler.add(ask(number, tokens, answer), 0.0)
    schedule, commit = [], []
    while scheduler.jobs:
        begun = time.thread_time()
        batch = scheduler.schedule(0.0)
        scheduled = time.thread_time()
        assert batch is not None
        tokens = [1] * len(batch.outputs)
        given = time.thread_time()
        scheduler.commit(batch, tokens)
        if batch.decodes == SEQUENCES:
            schedule.append(scheduled - begun)
            commit.append(time.thread_time() - given)
        elif scheduler.collect().jobs:
            break
        if waiting and len(schedule) == 1:
            pool.allocate(pool.free - SEQUENCES * (answer // PAGE))  # so that the others can grow, and no one comes in
            for number in range(SEQUENCES, SEQUENCES + waiting):
                known = load[number % SEQUENCES]
                scheduler.add(ask(number, known + some_tokens(rng, 7800), answer), 0.0)
    return schedule, commit


def prompts(rng: random.Random) -> Iterator[Tokens]:
    beginnings = [some_tokens(rng, 400) for _ in range(100)]
    conversation: Tokens = ()
    turns = 0
    for number in range(PROMPTS):
        if number % 2:
            yield rng.choice(beginnings) + some_tokens(rng, rng.randint(20, 600))
        else:
            turns = (turns + 1) % 8
            conversation = (conversation if turns else ()) + some_tokens(rng, rng.randint(20, 160))
            yield conversation


def time_tree() -> None:
    load = list(prompts(random.Random(1)))
    pool = PagePool(sum(-(-len(tokens) // PAGE) for tokens in load), PAGE)
    tree = RadixTree(pool)
    times: dict[str, list[float]] = {"length": [], "match": [], "insert": [], "evict a page": []}

    def timed(name: str, begun: float) -> None:
        times[name].append(time.thread_time() - begun)

    for tokens in load:
        begun = time.thread_time()
        known = tree.length(tokens, "")
        timed("length", begun)
        begun = time.thread_time()
        match = tree.match(tokens, "")
        timed("match", begun)
        if match.length != known:
            raise SystemExit(f"match found {match.length} tokens, length {known}")
        pages = pool.allocate(pool.covering(len(tokens)))
        begun = time.thread_time()
        tree.insert(tokens, pages, "")
        timed("insert", begun)
        for page in pages:
            pool.release(page)
    held = pool.pages - pool.free
    while pool.free < pool.pages:
        begun = time.thread_time()
        tree.evict(1)
        timed("evict a page", begun)
    print(f"\n{PROMPTS} prompts of {statistics.mean(map(len, load)):.0f} tokens on average, {held} pages in the tree")
    print("\n| radix tree | µs, median | p99 |")
    print("| --- | ---: | ---: |")
    for name, seconds in times.items():
        print(f"| {name} | {figures(seconds, 1e-6)} |")


@dataclass
class Arrival:
    at: float
    tokens: Tokens
    answer: int
    cold: bool


def arrivals(rng: random.Random) -> list[Arrival]:
    beginnings = [some_tokens(rng, 400) for _ in range(128)]
    load, now = [], 0.0
    for number in range(REQUESTS):
        busy = number // 1000 % 2 == 0
        now += rng.expovariate(90.0 if busy else 20.0)
        cold = rng.random() < 0.05
        beginning = some_tokens(rng, 400) if cold else rng.choice(beginnings)
        tokens = beginning + some_tokens(rng, rng.randint(20, 60))
        load.append(Arrival(now, tokens, rng.randint(16, 64), cold))
    return load


def compare_orders() -> None:
    load = arrivals(random.Random(2))
    print("\n| order | tokens found | wait s, median | p99 | longest | longest, cold |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, policy in (
        ("first come first served", Policy(order="fcfs", max_running=32, max_batch_tokens=512)),
        ("longest prefix first, ageing 2 s", Policy(ageing_s=2.0, max_running=32, max_batch_tokens=512)),
        ("longest prefix first, ageing 5 s", Policy(ageing_s=5.0, max_running=32, max_batch_tokens=512)),
        ("longest prefix first, no ageing", Policy(ageing_s=1e9, max_running=32, max_batch_tokens=512)),
    ):
        print(f"| {name} | {serve(load, policy)} |")


def serve(load: list[Arrival], policy: Policy) -> str:
    pool = PagePool(1200, PAGE)
    tree = RadixTree(pool)
    scheduler = Scheduler(PagedSpace(pool, tree), policy, 8192)
    waits: dict[str, float] = {}
    now, coming = 0.0, 0
    while coming < len(load) or scheduler.jobs:
        if not scheduler.jobs:
            now = max(now, load[coming].at)
        while coming < len(load) and load[coming].at <= now:
            scheduler.add(ask(coming, load[coming].tokens, load[coming].answer), load[coming].at)
            coming += 1
        batch = scheduler.schedule(now)
        if batch is None:
            raise SystemExit("there is work, but nothing is scheduled")
        waits.update({job.request.id: now - job.arrived for job in batch.started})
        now += STEP_S + TOKEN_S * batch.tokens
        scheduler.commit(batch, [1] * len(batch.outputs))
        scheduler.collect()
    tree.evict(pool.pages)
    if len(waits) != len(load) or pool.free != pool.pages:
        raise SystemExit(f"{len(waits)} of {len(load)} requests ran, {pool.free} of {pool.pages} pages came back")
    cold = max(waits[str(number)] for number, arrival in enumerate(load) if arrival.cold)
    found = scheduler.cached_tokens / scheduler.prompt_tokens
    return f"{found:.1%} | {figures(list(waits.values()), 1)} | {max(waits.values()):.2f} | {cold:.2f}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    time_steps()
    time_tree()
    compare_orders()


if __name__ == "__main__":
    main()
