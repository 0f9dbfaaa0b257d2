"""Greedy tokens are those of transformers' generate, whichever way the keys and values come to be where they are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from accel.memory.paged_kv import page_bytes
from models.llm.loading import LanguageModel, load_llm
from service.llm.assembly import Assembly, KvPlan, assemble
from service.llm.request import Completed
from service.llm.scheduler import Policy
from tests.service.llm.tiny import expected, finish, greedy

PAGE = 4  # tokens
LENGTH = 160


def assembled(
    model: LanguageModel,
    *,
    pages: int = 400,
    host_pages: int = 0,
    kind: str = "paged",
    prefixes: bool = True,
    **policy: object,
) -> Assembly:
    config = model.config
    one = page_bytes(config.layers, PAGE, config.kv_heads, config.head_dim, model.decoder.dtype)
    plan = KvPlan(
        kind=kind,  # type: ignore[arg-type]
        budget_bytes=pages * one if kind != "virtual" else 8 << 20,
        host_bytes=host_pages * one,
        page_size=PAGE,
        prefixes=prefixes,
        max_length=LENGTH,
    )
    return assemble(model, Policy(**{"max_running": 16, "max_batch_tokens": 256} | policy), plan)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(256) for _ in range(rng.choice([1, 3, 17, 40, 77]))] for _ in range(12)]


@pytest.fixture(scope="module")
def answers(reference: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    return [expected(reference, prompt, 24) for prompt in prompts]


def check(assembly: Assembly, prompts: list[list[int]], answers: list[list[int]]) -> None:
    requests = [greedy(prompt, 24, id=str(index)) for index, prompt in enumerate(prompts)]
    written = finish(assembly.engine, requests)
    assert [written[request.id].tokens[0] for request in requests] == answers
    assert all(isinstance(written[request.id].end, Completed) for request in requests)


def returned(assembly: Assembly) -> bool:
    """Whether no page is held when what the tree keeps is evicted."""
    assert assembly.pool is not None
    if assembly.tree is not None:
        assembly.tree.evict(assembly.pool.pages)
    return assembly.pool.free == assembly.pool.pages


@pytest.mark.parametrize("kind", ["paged", "virtual", "reserved"])
def test_each_kind_of_memory(
    model: LanguageModel, kind: str, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    assembly = assembled(model, kind=kind)
    check(assembly, prompts, answers)
    assert assembly.pool is None or returned(assembly)


@pytest.mark.parametrize("kind", ["paged", "virtual"])
@pytest.mark.parametrize("budget", [5, 16, 50])
def test_prompts_read_in_chunks_beside_those_that_generate(
    model: LanguageModel, kind: str, budget: int, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    check(assembled(model, kind=kind, max_running=5, max_batch_tokens=budget), prompts, answers)


@pytest.mark.parametrize("mode", ["static", "request"])
def test_the_baselines(model: LanguageModel, mode: str, prompts: list[list[int]], answers: list[list[int]]) -> None:
    check(assembled(model, mode=mode, max_running=5), prompts, answers)


def test_prefixes_found_in_memory(
    model: LanguageModel, prompts: list[list[int]], answers: list[list[int]], reference: LlamaForCausalLM
) -> None:
    """The whole prompt again, half of one with another end, and a prompt with its answer: hits end inside pages."""
    assembly = assembled(model)
    check(assembly, prompts, answers)
    found_before = assembly.scheduler.cached_tokens
    again = [
        *prompts,
        *([*prompt[: len(prompt) // 2 + 1], 7, 8] for prompt in prompts),
        *([*prompt, *answer[:13]] for prompt, answer in zip(prompts, answers, strict=True)),
    ]
    before = assembly.scheduler.prompt_tokens
    check(assembly, again, [expected(reference, prompt, 24) for prompt in again])
    assert assembly.scheduler.cached_tokens - found_before > 0.7 * (assembly.scheduler.prompt_tokens - before)
    assert returned(assembly)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("prefixes", [True, False])
def test_preempted_when_memory_runs_out(
    model: LanguageModel, preemption: str, prefixes: bool, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    assembly = assembled(model, pages=40, host_pages=200, preemption=preemption, prefixes=prefixes)
    check(assembly, prompts, answers)
    assert assembly.scheduler.preemptions > 0
    assert returned(assembly)


def test_virtual_memory_that_runs_out(model: LanguageModel, prompts: list[list[int]], answers: list[list[int]]) -> None:
    config = model.config
    plan = KvPlan(kind="virtual", budget_bytes=3 * 256 * 1024, max_length=LENGTH)
    assembly = assemble(model, Policy(max_running=8, max_batch_tokens=64), plan)
    assert assembly.virtual is not None
    assert assembly.virtual.token_bytes == 2 * config.layers * config.kv_heads * config.head_dim * 4
    check(assembly, prompts, answers)


def test_a_batch_padded_to_its_bucket(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    """As it runs where graphs are captured: rows beyond the batch are read and written by no one."""
    monkeypatch.setattr("accel.graphs.BucketGraphs.bucket", lambda graphs, count: 16 if count <= 16 else None)
    check(assembled(model), prompts, answers)
    check(assembled(model, kind="virtual"), prompts, answers)


def test_bfloat16_runs(tiny_folder: Path, tmp_path: Path) -> None:
    half = load_llm(str(tiny_folder), dtype="bfloat16", device="cpu", cache_dir=tmp_path)
    assert half.decoder.dtype is torch.bfloat16
    written = finish(assembled(half).engine, [greedy(range(20), 10, id="a")])
    assert len(written["a"].tokens[0]) == 10
