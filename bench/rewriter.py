"""What rewriting does to 200 held-out noisy prompts: subjects, attributes, the latent cache's chances, and its time.

    python bench/rewriter.py [--adapter out/rewriter] [--limit 200] [--device auto] [-o out/rewriter]

The prompts have noise, words and phrasings that tuning never saw (models/training/rewriter). One line a contender: the
prompts as typed, what the language model answers, and what is drawn from once guards and the time budget have spoken.
Then the cache: it holds another wording of each prompt's meaning, and "hit" is a nearest neighbour of at least that
similarity, "right" one that means the same. One rewrite at a time, as a lone request has it; the first, which fills the
prefix cache, is not timed. Pictures of both are scored with the two commands that the last lines name.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import numpy as np
from timing import print_table
from transformers import AutoTokenizer

from models.bundles.registry import bundle_path
from models.llm.loading import LanguageModel, load_llm
from models.rewriter.subjects import Vocabulary
from models.rewriter.template import Message, caption_of
from models.scorer.embedder import Embedder, load_embedder
from models.training.concepts import load_concepts
from models.training.prompts import TWINS, write_records
from models.training.rewriter.facts import score
from models.training.rewriter.heldout import held_out, other_wordings, records
from models.training.rewriter.pairs import Pair, PairWriter
from service.config import ModelSettings
from service.events import Failed
from service.llm.assembly import KvPlan, assemble
from service.llm.request import Completed, Delta, LlmRequest, SamplingParams, Usage
from service.llm.rewrite import CPU_BUDGET_S, GPU_BUDGET_S, Rewrite, Rewriter
from service.llm.scheduler import Policy

LENGTH = 32  # tokens that the default bundle reads
SIMILARITIES = (0.9, 0.95, 0.99)
POOL = 1 << 26  # bytes of keys and values


class Stepped:
    """A text model that steps its engine while it is read."""

    def __init__(self, model: LanguageModel) -> None:
        policy = Policy(max_running=1)
        self._tokenizer, self._engine = model.tokenizer, assemble(model, policy, KvPlan(budget_bytes=POOL)).engine
        self._ids = itertools.count()
        self.answers: list[str] = []
        self.usages: list[Usage] = []

    async def answer(self, messages: Sequence[Message], max_tokens: int) -> AsyncGenerator[str, None]:
        tokens = tuple(self._tokenizer.encode_chat(messages))
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        request = LlmRequest(id=str(next(self._ids)), tokens=tokens, params=params)
        self._engine.add(request)
        said = ""
        try:
            while self._engine.has_work():
                for event in self._engine.step():
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Completed):
                        self.usages.append(event.usage)
                    if isinstance(event, Delta) and event.text:
                        said += event.text
                        yield event.text
                await asyncio.sleep(0)
        finally:
            self.answers.append(said)
            self._engine.abort(request.id)
            while self._engine.has_work():
                self._engine.step()


async def rewritten(rewriter: Rewriter, prompts: Sequence[str]) -> list[Rewrite]:
    return [await rewriter.rewrite(prompt) for prompt in prompts]


def cache_row(
    name: str, embedder: Embedder, asked: Sequence[str], held: Sequence[str], pairs: Sequence[Pair]
) -> list[str]:
    """How near the nearest prompt of a cache is, and whether it is of the same meaning."""
    similar = embedder.embed(asked) @ embedder.embed(held).T
    nearest = similar.argmax(1)
    best = similar.max(1)
    captions = np.array([pair.caption for pair in pairs])
    right = float(np.mean(captions[nearest] == captions))
    hits = [f"{np.mean(best >= edge):.0%}" for edge in SIMILARITIES]
    return [name, str(len({*asked, *held})), f"{best.mean():.3f}", *hits, f"{right:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="folder of a tuned adapter; without it the language model is as it came")
    parser.add_argument("--limit", type=int, default=200, help="prompts, spread over all kinds of noise")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/rewriter"))
    options = parser.parse_args()
    cache_dir = ModelSettings().cache_dir
    home = bundle_path("default", cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(home / "tokenizer", local_files_only=True)

    def fits(caption: str) -> bool:
        return len(tokenizer(caption)["input_ids"]) <= LENGTH

    concepts = load_concepts()
    pairs = held_out(PairWriter(concepts, fits, unseen=True))
    pairs = [pairs[i * len(pairs) // options.limit] for i in range(options.limit)]
    others = other_wordings(PairWriter(concepts, fits), pairs)
    model = load_llm("default", device=options.device, cache_dir=cache_dir, lora=options.adapter)
    text = Stepped(model)
    vocabulary = Vocabulary(concepts, lambda word: len(model.tokenizer.encode(f" {word}")) == 1)
    budget = GPU_BUDGET_S if model.decoder.device.type == "cuda" else CPU_BUDGET_S
    rewriter = Rewriter(text, vocabulary, fits, budget)
    prompts = [pair.prompt for pair in pairs]
    asyncio.run(rewriter.rewrite(prompts[0]))
    text.answers.clear()
    text.usages.clear()
    results = asyncio.run(rewritten(rewriter, prompts))
    answers, usages = [caption_of(answer) for answer in text.answers], list(text.usages)
    again = asyncio.run(rewritten(rewriter, [pair.prompt for pair in others]))

    plain = Vocabulary(concepts)
    rows = []
    used = [result.prompt for result in results]
    for name, texts in (("as typed", prompts), ("answers", answers), ("drawn from", used)):
        one = score(pairs, texts, plain)
        rows.append([name, f"{one.exact:.1%}", f"{one.subject:.1%}", f"{one.attributes:.1%}", f"{one.invented:.1%}"])
    print_table(("", "exact", "subject kept", "attributes", "says more"), rows)
    outcomes = Counter(result.outcome for result in results)
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    seconds = np.array([result.seconds for result in results])
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    print(
        f"{p50:.0f} ms p50, {p99:.0f} ms p99, budget {budget * 1e3:.0f} ms, {model.card.name} on {model.decoder.device}"
    )
    if usages:
        cached = sum(usage.cached for usage in usages) / sum(usage.prompt for usage in usages)
        print(f"{cached:.1%} of the prompts' tokens were in the prefix cache\n")
    embedder = load_embedder(home / "scorer", home / "text_encoder", home / "tokenizer")
    held = [result.prompt for result in again]
    table = [
        cache_row("as typed", embedder, prompts, [pair.prompt for pair in others], pairs),
        cache_row("rewritten", embedder, used, held, pairs),
    ]
    print_table(("", "distinct", "similarity", *(f"hit {edge}" for edge in SIMILARITIES), "right"), table)

    options.output.mkdir(parents=True, exist_ok=True)
    noisy = [record for record in records(pairs, concepts) if record["objects"] and record["group"] != TWINS]
    chosen = dict(zip(prompts, used, strict=True))
    for name in ("typed", "rewritten"):
        path = options.output / f"{name}.jsonl"
        told = [{**each, "prompt": chosen[each["prompt"]] if name == "rewritten" else each["prompt"]} for each in noisy]
        write_records(path, [{**each, "twin": None} for each in told])
        print(f"headstart eval --prompts {path}")


if __name__ == "__main__":
    main()
