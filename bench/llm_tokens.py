"""Greedy tokens of the default language model against transformers' own, on every path that keys and values take.

64 prompts of ordinary text and of chats, 64 tokens each, float32. A row says how many answers are equal token by token,
and how far the log-probabilities of the tokens are from transformers' at most. Where an answer differs, the gap between
the two likeliest tokens at that place is told: below 1e-4 it is a matter of rounding.

    python bench/llm_tokens.py [--prompts 64] [--tokens 64] [--device cpu]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch
from llm_load import Asked, engine_of, generate, models, plan_of, requests_of
from transformers import LlamaForCausalLM

from models.llm.loading import LanguageModel
from service.llm.assembly import Assembly
from service.llm.request import Delta, LlmRequest, SamplingParams

TOPICS = ("the sea", "a small house", "why bread rises", "two foxes", "a broken clock", "the moon", "tea", "old maps")
FORMS = (
    "Tell me about {}.",
    "Write a short poem about {}.",
    "Explain {} to a child, in three sentences.",
    "List facts: {}",
)


def prompts(model: LanguageModel, count: int) -> list[list[int]]:
    """Half chats, half the beginnings of texts, of different lengths."""
    rng = random.Random(11)
    chosen = []
    for index in range(count):
        text = rng.choice(FORMS).format(", ".join(rng.sample(TOPICS, rng.randint(1, 6))))
        chat = [{"role": "user", "content": f"{text} ({index})"}]
        chosen.append(model.tokenizer.encode_chat(chat) if index % 2 else model.tokenizer.encode(f"{index}. {text}"))
    return chosen


def paths(model: LanguageModel, count: int, longest: int) -> dict[str, Assembly]:
    pages = count * -(-longest // 16)
    tight = max(2 * -(-longest // 16), pages // 6)

    def paged(pages: int, tokens: int = 2048, **policy: object) -> Assembly:
        prefixes = bool(policy.pop("prefixes", False))
        return engine_of(model, plan_of(model, pages, host_pages=pages * 4, prefixes=prefixes), 32, tokens, **policy)

    virtual = plan_of(model, 4 * pages + 4096, kind="virtual", max_length=longest)
    return {
        "paged": paged(pages),
        "radix hit": paged(2 * pages, prefixes=True),
        "chunked, 40 tokens a step": paged(pages, 40),
        "preempted, recomputed": paged(tight, preemption="recompute"),
        "preempted, swapped": paged(tight, preemption="swap"),
        "virtually contiguous": engine_of(model, virtual, 32, 2048),
    }


def answer(assembly: Assembly, requests: Sequence[LlmRequest]) -> dict[str, list[tuple[int, float]]]:
    """(token, log-probability) of each request's answer."""
    said: dict[str, list[tuple[int, float]]] = {request.id: [] for request in requests}
    for request in requests:
        assembly.engine.add(request)
    while assembly.engine.has_work():
        for event in assembly.engine.step():
            if isinstance(event, Delta):
                assert event.logprobs is not None
                said[event.request_id] += [(entry.token, entry.logprob) for entry in event.logprobs]
    return said


@torch.inference_mode()
def scores(network: LlamaForCausalLM, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """[L, V] log-probabilities with which each token of an answer was chosen."""
    device = network.device
    logits = network(torch.tensor([prompt + tokens], device=device)).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    model, network = models("float32", args.device)
    asked = [Asked(prompt, args.tokens) for prompt in prompts(model, args.prompts)]
    wanted = generate(network, asked, 16, lambda: 0.0).tokens
    tables = [scores(network, request.prompt, wanted[str(i)]) for i, request in enumerate(asked)]
    longest = max(len(request.prompt) for request in asked) + args.tokens
    requests = [
        LlmRequest(
            id=r.id,
            tokens=r.tokens,
            params=SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, logprobs=0),
        )
        for r in requests_of(asked)
    ]
    print("| path | answers equal | largest difference of a log-probability | gap where they part | preempted, found |")
    print("| --- | --- | --- | --- | --- |")
    for name, assembly in paths(model, args.prompts, longest).items():
        if name == "radix hit":
            answer(assembly, requests)  # leaves every prompt in memory
        said = answer(assembly, requests)
        equal, worst, gaps = 0, 0.0, []
        for index, table in enumerate(tables):
            mine = said[str(index)]
            tokens = [token for token, _ in mine]
            same = next(
                (at for at, pair in enumerate(zip(tokens, wanted[str(index)], strict=True)) if pair[0] != pair[1]), None
            )
            equal += same is None
            if same is not None:
                top = table[same].topk(2).values
                gaps.append(float(top[0] - top[1]))
            for (token, logprob), row in zip(mine[:same], table, strict=False):
                worst = max(worst, abs(logprob - float(row[token])))
        scheduler = assembly.scheduler
        gap = f"{max(gaps):.1e}" if gaps else ""
        counts = f"{scheduler.preemptions}, {scheduler.cached_tokens}"
        print(f"| {name} | {equal} of {len(asked)} | {worst:.1e} | {gap} | {counts} |", flush=True)


if __name__ == "__main__":
    main()
