"""Loads for the language-model benchmarks, ways to run them, and what they are measured by. Not a benchmark itself."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from accel.memory.paged_kv import page_bytes
from models.bundles import registry
from models.llm.loading import LanguageModel, load_llm
from service.config import ModelSettings
from service.events import Failed
from service.llm.assembly import Assembly, KvPlan, assemble
from service.llm.engine import LlmEngine
from service.llm.request import Delta, LlmRequest, SamplingParams
from service.llm.scheduler import Policy

Clock = Callable[[], float]


class Asked(NamedTuple):
    """A prompt, and how many tokens its answer has."""

    prompt: list[int]
    answer: int


def ragged(
    count: int, vocab_size: int, seed: int, prompt: int = 160, answer: int = 200, most: int = 1024
) -> list[Asked]:
    """Lengths as those of ShareGPT's conversations: log-normal, with these medians, and a few that are very long."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(np.log(prompt), 1.0, count), 4, most).astype(int)
    answers = np.clip(rng.lognormal(np.log(answer), 0.9, count), 2, most).astype(int)
    return [
        Asked(rng.integers(100, vocab_size - 100, size).tolist(), int(length))
        for size, length in zip(prompts, answers, strict=True)
    ]


def models(dtype: str, device: str) -> tuple[LanguageModel, LlamaForCausalLM]:
    """The default model, and transformers' own of the same weights."""
    cache_dir = ModelSettings().cache_dir
    model = load_llm("default", dtype=dtype, device=device, cache_dir=cache_dir)
    return model, reference(model, registry.language_folder("smollm2", cache_dir))


def reference(model: LanguageModel, folder: Path) -> LlamaForCausalLM:
    network = LlamaForCausalLM.from_pretrained(folder, dtype=model.decoder.dtype).eval()
    return network.to(model.decoder.device)


def plan_of(model: LanguageModel, pages: int, page_size: int = 16, host_pages: int = 0, **others: object) -> KvPlan:
    config = model.config
    one = page_bytes(config.layers, page_size, config.kv_heads, config.head_dim, model.decoder.dtype)
    return KvPlan(budget_bytes=pages * one, host_bytes=host_pages * one, page_size=page_size, **others)  # type: ignore[arg-type]


def engine_of(model: LanguageModel, plan: KvPlan, running: int, batch_tokens: int, **policy: object) -> Assembly:
    return assemble(model, Policy(max_running=running, max_batch_tokens=batch_tokens, **policy), plan)  # type: ignore[arg-type]


@dataclass
class Run:
    """Seconds and tokens of one run of a load."""

    seconds: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    gaps: list[float] = field(default_factory=list)  # between tokens of one answer
    first: dict[str, float] = field(default_factory=dict)  # from the start to an answer's first token

    @property
    def output(self) -> int:
        return sum(map(len, self.tokens.values()))

    @property
    def rate(self) -> float:
        return self.output / self.seconds

    @property
    def p99(self) -> float:
        return float(np.percentile(self.gaps, 99))


def requests_of(load: Iterable[Asked]) -> list[LlmRequest]:
    return [
        LlmRequest(
            id=str(index),
            tokens=tuple(asked.prompt),
            params=SamplingParams(temperature=0.0, max_tokens=asked.answer, ignore_eos=True),
        )
        for index, asked in enumerate(load)
    ]


def serve(engine: LlmEngine, load: Iterable[Asked], clock: Clock, each_step: Callable[[], None] | None = None) -> Run:
    """All requests at once; until all have ended."""
    run, last = Run(), dict[str, float]()
    begun = clock()
    for request in requests_of(load):
        engine.add(request)
    while engine.has_work():
        events = engine.step()
        now = clock()
        for event in events:
            if isinstance(event, Failed):
                raise SystemExit(f"request {event.request_id} failed: {event.error}")
            if isinstance(event, Delta):
                run.tokens[event.request_id] += event.tokens
                if event.request_id in last:
                    run.gaps.append(now - last[event.request_id])
                else:
                    run.first[event.request_id] = now - begun
                last[event.request_id] = now
        if each_step is not None:
            each_step()
    run.seconds = clock() - begun
    return run


@torch.inference_mode()
def generate(network: LlamaForCausalLM, load: Sequence[Asked], batch: int, clock: Clock) -> Run:
    """transformers' generate, `batch` prompts at a time, padded at their left, until the longest answer is done."""
    run = Run()
    begun = clock()
    for at in range(0, len(load), batch):
        part = load[at : at + batch]
        width = max(len(asked.prompt) for asked in part)
        tokens = torch.tensor([[0] * (width - len(asked.prompt)) + asked.prompt for asked in part])
        mask = torch.tensor([[0] * (width - len(asked.prompt)) + [1] * len(asked.prompt) for asked in part])
        output = network.generate(
            tokens.to(network.device),
            attention_mask=mask.to(network.device),
            max_new_tokens=max(asked.answer for asked in part),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, width:].tolist()
        for index, (asked, row) in enumerate(zip(part, output, strict=True)):
            run.tokens[str(at + index)] = row[: asked.answer]
    run.seconds = clock() - begun
    return run


def generate_continuously(network: LlamaForCausalLM, load: Sequence[Asked], clock: Clock) -> Run:
    """transformers' own continuous batching, warmed up before the clock starts."""
    config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max(asked.answer for asked in load))
    manager = network.init_continuous_batching(generation_config=config)
    manager.start()
    run = Run()
    try:
        manager.add_request(load[0].prompt, request_id="warm-up", max_new_tokens=4)
        while manager.get_result(timeout=1.0) is None:
            pass
        begun = clock()
        for index, asked in enumerate(load):
            manager.add_request(asked.prompt, request_id=str(index), max_new_tokens=asked.answer)
        while len(run.tokens) < len(load):
            result = manager.get_result(timeout=1.0)
            if result is not None:
                run.tokens[result.request_id] = list(result.generated_tokens)
        run.seconds = clock() - begun
    finally:
        manager.stop(block=True)
    return run


def rounds(contenders: dict[str, Callable[[], Run]], count: int) -> dict[str, list[Run]]:
    """Every contender in turn, so many times over: what else the machine does meets them all."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(count):
        names = list(contenders)
        random.Random(number).shuffle(names)
        for name in names:
            runs[name].append(contenders[name]())
    return runs


def best(runs: Sequence[Run]) -> Run:
    return min(runs, key=lambda run: run.seconds)


def clock_of(device: str) -> tuple[Clock, str]:
    """On a CPU, time that the process was given, over its threads: it does not count what others take."""
    if device == "cuda":
        return time.perf_counter, "wall seconds"
    torch.set_num_threads(1)
    return time.process_time, "seconds of one core"
