"""The default model writes what transformers writes with the same weights, on every path of its keys and values."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from accel.memory.paged_kv import page_bytes
from models.bundles import registry
from models.llm.loading import LanguageModel, load_llm
from service.config import ModelSettings
from service.llm.assembly import KvPlan, assemble
from service.llm.scheduler import Policy
from tests.service.llm.tiny import finish, greedy

TOKENS = 10
PAGE = 4  # tokens
QUESTIONS = ("Name a colour.", "Who lives in a hive, and what do they make there?", "Write a line about the sea.")


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    return load_llm("default", dtype="float32", device="cpu", cache_dir=ModelSettings().cache_dir)


@pytest.fixture(scope="module")
def prompts(smollm2: LanguageModel) -> list[list[int]]:
    return [smollm2.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def answers(prompts: list[list[int]]) -> list[list[int]]:
    network = LlamaForCausalLM.from_pretrained(registry.language_folder("smollm2", ModelSettings().cache_dir)).eval()
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = network.generate(
            tokens, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return output[:, width:].tolist()


@pytest.mark.parametrize(
    ("kind", "tight", "batch_tokens", "preemption", "times"),
    [
        ("paged", False, 256, "recompute", 1),
        ("paged, radix hits", False, 256, "recompute", 2),
        ("paged, chunked", False, 9, "recompute", 1),
        ("paged, recomputed", True, 256, "recompute", 1),
        ("paged, swapped", True, 256, "swap", 1),
        ("virtual", False, 256, "recompute", 1),
    ],
)
def test_greedy_tokens_are_transformers_own(
    smollm2: LanguageModel,
    prompts: list[list[int]],
    answers: list[list[int]],
    kind: str,
    tight: bool,
    batch_tokens: int,
    preemption: str,
    times: int,
) -> None:
    config = smollm2.config
    one = page_bytes(config.layers, PAGE, config.kv_heads, config.head_dim, torch.float32)
    all_prompts = sum(-(-len(prompt) // PAGE) for prompt in prompts)
    pages = all_prompts + 2 if tight else 160
    plan = KvPlan(
        kind=kind.split(",")[0],  # type: ignore[arg-type]
        budget_bytes=pages * one,
        host_bytes=160 * one,
        page_size=PAGE,
        max_length=128,
        prefixes=times > 1,
    )
    policy = Policy(max_running=3, max_batch_tokens=batch_tokens, preemption=preemption)  # type: ignore[arg-type]
    assembly = assemble(smollm2, policy, plan)
    for _ in range(times):
        written = finish(assembly.engine, [greedy(prompt, TOKENS, id=str(i)) for i, prompt in enumerate(prompts)])
        assert [written[str(i)].tokens[0] for i in range(len(prompts))] == answers
    assert (assembly.scheduler.cached_tokens > 0) == (times > 1)
    assert (assembly.scheduler.preemptions > 0) == tight
