"""What the match predictor saves and what it costs, against lookups in the local index: a Markdown table.

python bench/cache_predictor.py [--prompts 20000]

A made stream of embeddings, clustered as those of prompts are: unit vectors along topic + 0.5·session + 0.25·prompt,
all three normal with a variance that falls as 1/(1 + i) over 256 coordinates. Topics have Zipf popularity, each has 20
sessions, and every fifth prompt has a topic never seen before or after. Each prompt is looked up, and what NIRVANA's
thresholds call a miss is added to the index. The predictor sees the stream from its start; the second half is measured.

"right" and "wrong" are the shares of lookups that it skips and that would have missed or hit; "steps lost" are the
steps of 50 that the wrong ones would have saved, per 100 prompts. "pays from" is how long a lookup would have to take
for the time of the lookups skipped to be worth the predictor's own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.latent.index import Index
from cache.latent.policy import nirvana
from cache.latent.predictor import MatchPredictor

Vector = NDArray[np.float32]

WIDTH = 256
TOPICS, SESSIONS = 300, 20
CANDIDATES = 16
POLICY = nirvana({k: k / 50 for k in (5, 10, 15, 20, 25)})
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("wrong 0.02", {"wrong": 0.02}),
    ("wrong 0.05", {"wrong": 0.05}),
    ("wrong 0.05, 4096 embeddings", {"wrong": 0.05, "capacity": 4096, "every": 1024}),
    ("wrong 0.2", {"wrong": 0.2}),
]


def stream(count: int) -> Iterator[Vector]:
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.arange(WIDTH))
    topics = rng.standard_normal((TOPICS, WIDTH)) * scale
    sessions = rng.standard_normal((TOPICS, SESSIONS, WIDTH)) * scale
    popularity = 1 / np.arange(1, TOPICS + 1)
    for i in range(count):
        if i % 5 == 0:
            base = (rng.standard_normal(WIDTH) + 0.5 * rng.standard_normal(WIDTH)) * scale
        else:
            topic = rng.choice(TOPICS, p=popularity / popularity.sum())
            base = topics[topic] + 0.5 * sessions[topic, rng.integers(SESSIONS)]
        vector = base + 0.25 * rng.standard_normal(WIDTH) * scale
        yield (vector / np.linalg.norm(vector)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20_000)
    count = parser.parse_args().prompts

    predictors = [MatchPredictor(**options) for _, options in VARIANTS]
    index = Index(WIDTH)
    lookup_s, hits = [], 0
    asked_s: list[list[float]] = [[] for _ in VARIANTS]
    right, wrong, lost = ([0.0] * len(VARIANTS) for _ in range(3))
    for i, embedding in enumerate(stream(count)):
        began = time.perf_counter()
        _, similarities = index.search(embedding, CANDIDATES)
        took = time.perf_counter() - began
        deepest = POLICY.deepest("solver", float(similarities[0])) if len(similarities) else None
        measured = i >= count // 2
        if measured:
            lookup_s.append(took)
            hits += deepest is not None
        for j, predictor in enumerate(predictors):
            began = time.perf_counter()
            asked = predictor.may_match(embedding)
            if measured:
                asked_s[j].append(time.perf_counter() - began)
                if not asked and deepest is None:
                    right[j] += 1
                elif not asked and deepest is not None:
                    wrong[j] += 1
                    lost[j] += POLICY.steps(deepest)
            if asked and deepest is not None:
                predictor.matched(embedding)
                predictor.settle(60.0)  # its training must not slow down what is measured
        if deepest is None:
            index.add(np.array([i]), embedding[None])

    n = len(lookup_s)
    lookup_ms = 1000 * float(np.median(lookup_s))
    print(f"{n} prompts, {len(index)} entries at the end, {100 * hits / n:.1f}% of lookups hit\n")
    print(
        "| predictor | lookup ms | predictor ms | right % | wrong % | steps lost | ms saved a lookup | pays from ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for j, (name, _) in enumerate(VARIANTS):
        asked_ms = 1000 * float(np.median(asked_s[j]))
        skipped = (right[j] + wrong[j]) / n
        pays = f"{asked_ms / skipped:.2f}" if skipped else "never"
        print(
            f"| {name} | {lookup_ms:.3f} | {asked_ms:.3f} | {100 * right[j] / n:.1f} | {100 * wrong[j] / n:.1f} "
            f"| {100 * lost[j] / n:.1f} | {skipped * lookup_ms - asked_ms:.3f} | {pays} |"
        )


if __name__ == "__main__":
    main()
