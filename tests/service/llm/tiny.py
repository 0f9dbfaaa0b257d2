"""A tiny random Llama whose tokens are bytes, what transformers writes with it, and an engine stepped to its end."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

from service.events import Cancelled, Failed, Started
from service.llm.engine import LlmEngine
from service.llm.request import ChoiceEnded, Completed, Delta, Event, LlmRequest, SamplingParams, TokenLogprob

EOS = 256


def llama(folder: Path) -> Path:
    """Three query heads to a key-value head, as SmolLM2; weights large enough that greedy texts vary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=EOS + 1,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


@dataclass
class Answer:
    """What an engine said about one request."""

    started: int = 0
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # by choice
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=lambda: defaultdict(list))
    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    reasons: dict[int, str] = field(default_factory=dict)
    end: Completed | Failed | Cancelled | None = None


def told(events: Iterable[Event], answers: dict[str, Answer]) -> None:
    """Note events, in which a request says nothing before it starts and nothing after it ends."""
    for event in events:
        answer = answers[event.request_id]
        assert answer.end is None
        if isinstance(event, Started):
            answer.started += 1
        elif isinstance(event, Delta):
            assert answer.started == 1
            assert event.choice not in answer.reasons
            answer.tokens[event.choice] += event.tokens
            answer.logprobs[event.choice] += event.logprobs or ()
            answer.text[event.choice] += event.text
        elif isinstance(event, ChoiceEnded):
            answer.reasons[event.choice] = event.reason
        else:
            answer.end = event


def finish(engine: LlmEngine, requests: Sequence[LlmRequest] = (), steps: int = 10000) -> dict[str, Answer]:
    """Add requests and step until all live ones have ended."""
    answers: dict[str, Answer] = defaultdict(Answer)
    for request in requests:
        engine.add(request)
    while engine.has_work():
        told(engine.step(), answers)
        steps -= 1
        assert steps, "the engine does not come to an end"
    return answers


def greedy(prompt: Sequence[int], max_tokens: int, id: str = "", **others: object) -> LlmRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return LlmRequest(id=id or str(hash(tuple(prompt))), tokens=tuple(prompt), params=params, **others)  # type: ignore[arg-type]


@torch.inference_mode()
def expected(reference: LlamaForCausalLM, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy tokens of transformers' generate, which goes on after an end of text."""
    tokens = torch.tensor([list(prompt)])
    output = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()
