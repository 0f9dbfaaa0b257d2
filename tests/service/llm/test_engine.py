"""What an engine says about requests: sampling, text, ends of every kind, and faults of the model."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from accel.attention.batch import TokenBatch
from accel.memory.paged_kv import page_bytes
from models.llm.loading import LanguageModel
from service.errors import DeadlineError, InputError, NonFiniteError, OutOfMemoryError, UnavailableError
from service.events import Cancelled, Failed
from service.llm.assembly import Assembly, KvPlan, assemble
from service.llm.request import Completed, LlmRequest, SamplingParams
from service.llm.scheduler import Policy
from tests.service.llm.tiny import EOS, Answer, expected, finish, greedy, told

PROMPT = tuple(range(60, 83))


def assembled(model: LanguageModel, pages: int = 200, clock: object = None, **policy: object) -> Assembly:
    config = model.config
    one = page_bytes(config.layers, 4, config.kv_heads, config.head_dim, model.decoder.dtype)
    chosen = Policy(**{"max_running": 16, "max_batch_tokens": 128} | policy)  # type: ignore[arg-type]
    plan = KvPlan(budget_bytes=pages * one, page_size=4)
    return assemble(model, chosen, plan, **({} if clock is None else {"clock": clock}))  # type: ignore[arg-type]


def drawing(id: str, prompt: tuple[int, ...] = PROMPT, n: int = 1, **params: object) -> LlmRequest:
    asked = {"temperature": 1.0, "max_tokens": 16, "ignore_eos": True, "seed": 5} | params
    return LlmRequest(id=id, tokens=prompt, params=SamplingParams(**asked), n=n)  # type: ignore[arg-type]


def crowd(count: int) -> list[LlmRequest]:
    rng = random.Random(3)
    return [
        drawing(f"other {i}", tuple(rng.choices(range(256), k=rng.randint(1, 40))), seed=i, temperature=rng.random())
        for i in range(count)
    ]


SAMPLINGS = [
    {},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"temperature": 0.7, "repetition_penalty": 1.3, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("params", SAMPLINGS)
def test_what_is_drawn_does_not_depend_on_neighbours(model: LanguageModel, params: dict[str, object]) -> None:
    alone = finish(assembled(model).engine, [drawing("a", **params)])["a"]
    together = finish(assembled(model, max_batch_tokens=20).engine, [*crowd(9), drawing("a", **params)])["a"]
    assert together.tokens == alone.tokens
    other = finish(assembled(model).engine, [drawing("a", **params | {"seed": 6})])["a"]
    assert (other.tokens == alone.tokens) == (params.get("temperature") == 0.0)


def test_the_choices_of_a_request_are_those_of_requests_with_the_next_seeds(model: LanguageModel) -> None:
    several = finish(assembled(model).engine, [drawing("a", n=3)])["a"]
    single = finish(assembled(model).engine, [drawing(str(i), seed=5 + i) for i in range(3)])
    assert [several.tokens[i] for i in range(3)] == [single[str(i)].tokens[0] for i in range(3)]
    assert several.reasons == dict.fromkeys(range(3), "length")
    assert isinstance(several.end, Completed)
    assert (several.end.usage.prompt, several.end.usage.completion) == (len(PROMPT), 48)


def test_repetition_penalty_is_transformers_own(model: LanguageModel, reference: LlamaForCausalLM) -> None:
    tokens = torch.tensor([PROMPT])
    with torch.inference_mode():
        output = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=16,
            do_sample=False,
            repetition_penalty=1.5,
            eos_token_id=None,
        )
    answer = finish(assembled(model).engine, [drawing("a", temperature=0.0, repetition_penalty=1.5)])["a"]
    assert answer.tokens[0] == output[0, len(PROMPT) :].tolist()


def test_log_probabilities_are_the_models(model: LanguageModel, reference: LlamaForCausalLM) -> None:
    request = drawing("a", logprobs=4, temperature=0.6, top_p=0.9, repetition_penalty=1.2)
    plain = drawing("b", logprobs=0)
    written = finish(assembled(model).engine, [request, plain, *crowd(3)])
    answer = written["a"]
    with torch.inference_mode():
        logits = reference(torch.tensor([[*PROMPT, *answer.tokens[0]]])).logits[0, len(PROMPT) - 1 : -1]
    wanted = logits.double().log_softmax(-1)
    for row, token, told_ in zip(wanted, answer.tokens[0], answer.logprobs[0], strict=True):
        assert told_.token == token
        assert told_.logprob == pytest.approx(row[token].item(), abs=1e-4)
        best = row.topk(4)
        assert [pair[0] for pair in told_.top] == best.indices.tolist()
        assert [pair[1] for pair in told_.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(entry.top == () for entry in written["b"].logprobs[0])
    assert len(written["b"].logprobs[0]) == 16
    assert written["other 0"].logprobs[0] == []


def test_an_end_of_text_ends_a_choice(model: LanguageModel) -> None:
    """Drawn at temperature 2 the text ends at some point; its mark is a token of the answer, not of the text."""
    engine = assembled(model).engine
    requests = [drawing(str(i), seed=i, temperature=2.0, max_tokens=100, ignore_eos=False) for i in range(12)]
    written = finish(engine, requests)
    stopped = [answer for answer in written.values() if answer.reasons[0] == "stop"]
    assert stopped
    for answer in written.values():
        ended = answer.reasons[0] == "stop"
        body = answer.tokens[0][:-1] if ended else answer.tokens[0]
        assert (answer.tokens[0][-1] == EOS) == ended
        assert EOS not in body
        assert answer.text[0] == model.tokenizer.decode(body)
        assert len(answer.tokens[0]) <= 100


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_ends_a_choice_and_is_cut_out(model: LanguageModel, length: int) -> None:
    full = finish(assembled(model).engine, [drawing("a", max_tokens=40)])["a"]
    text = full.text[0]
    stop = text[10 : 10 + length]
    answer = finish(assembled(model).engine, [drawing("a", max_tokens=40, stop=("never comes", stop))])["a"]
    assert answer.text[0] == text[: text.index(stop)]
    assert answer.reasons == {0: "stop"}
    assert answer.tokens[0] == full.tokens[0][: len(answer.tokens[0])]
    assert stop in model.tokenizer.decode(answer.tokens[0])
    assert len(answer.tokens[0]) < 40


def test_an_abort_frees_memory_at_once(model: LanguageModel) -> None:
    assembly = assembled(model)
    assert assembly.pool is not None
    assert assembly.tree is not None
    answers: dict[str, Answer] = defaultdict(Answer)
    assembly.engine.add(greedy(PROMPT, 100, id="a", n=2))
    assembly.engine.add(greedy(PROMPT[:5], 8, id="b"))
    for _ in range(3):
        told(assembly.engine.step(), answers)
    assembly.engine.abort("a")
    assembly.engine.abort("nobody")
    assert assembly.scheduler.running == 1
    told(assembly.engine.step(), answers)
    assert isinstance(answers["a"].end, Cancelled)
    while assembly.engine.has_work():
        told(assembly.engine.step(), answers)
    assert isinstance(answers["b"].end, Completed)
    assembly.tree.evict(assembly.pool.pages)
    assert assembly.pool.free == assembly.pool.pages


def test_too_little_memory_for_all_is_enough_for_each(model: LanguageModel, reference: LlamaForCausalLM) -> None:
    """14 pages hold one of these at a time and a little more: they take turns, and everyone gets what is due."""
    assembly = assembled(model, pages=14)
    requests = [greedy(range(i, i + 20), 30, id=str(i)) for i in range(12)]
    written = finish(assembly.engine, requests)
    assert all(isinstance(written[request.id].end, Completed) for request in requests)
    assert written["7"].tokens[0] == expected(reference, range(7, 27), 30)


def test_what_could_never_run_is_refused(model: LanguageModel) -> None:
    engine = assembled(model, pages=10).engine
    with pytest.raises(InputError, match="the prompt has 40 tokens; at most 39 are allowed"):
        engine.add(greedy(range(40), 5))
    with pytest.raises(InputError, match="max_tokens: 25 is not allowed; at most 20"):
        engine.add(greedy(range(20), 25))
    assert not engine.has_work()


def test_a_request_past_its_deadline_fails(model: LanguageModel) -> None:
    now = [0.0]
    engine = assembled(model, clock=lambda: now[0]).engine
    answers: dict[str, Answer] = defaultdict(Answer)
    engine.add(replace(greedy(PROMPT, 50, id="a"), deadline_s=5.0))
    for moment in (1.0, 4.9, 5.1):
        now[0] = moment
        told(engine.step(), answers)
    end = answers["a"].end
    assert isinstance(end, Failed)
    assert isinstance(end.error, DeadlineError)
    assert (end.timings.queue_s, end.timings.first_token_s, end.timings.total_s) == (1.0, 1.0, 5.1)
    assert not engine.has_work()


def test_fail_all_ends_what_runs_and_what_waits(model: LanguageModel) -> None:
    assembly = assembled(model, max_running=2)
    requests = [greedy(PROMPT, 20, id=str(i)) for i in range(4)]
    for request in requests:
        assembly.engine.add(request)
    assembly.engine.step()
    events = assembly.engine.fail_all(UnavailableError("gone"))
    assert sorted(event.request_id for event in events if isinstance(event, Failed)) == ["0", "1", "2", "3"]
    assert not assembly.engine.has_work()
    assert isinstance(finish(assembly.engine, requests[:1])["0"].end, Completed)


class Sick:
    """A decoder that does harm to batches in which a position is reached, or of more tokens than fit."""

    def __init__(self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 10**9
        self.nan_at = self.raise_at = -1
        self.calls = 0
        self._forward = model.decoder.forward
        monkeypatch.setattr(model.decoder, "forward", self)

    def __call__(self, batch: TokenBatch) -> torch.Tensor:
        self.calls += 1
        if len(batch.tokens) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        if (batch.positions == self.raise_at).any():
            raise RuntimeError("a defect")
        logits = self._forward(batch).clone()
        logits[batch.positions[batch.last] == self.nan_at] = float("nan")
        return logits


@pytest.fixture
def sick(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Sick:
    return Sick(model, monkeypatch)


def test_logits_that_are_not_finite_fail_their_request_alone(model: LanguageModel, sick: Sick) -> None:
    sick.nan_at = 30
    written = finish(assembled(model).engine, [greedy(PROMPT, 20, id="long"), greedy(PROMPT[:5], 20, id="short")])
    end = written["long"].end
    assert isinstance(end, Failed)
    assert isinstance(end.error, NonFiniteError)
    assert isinstance(written["short"].end, Completed)


def test_out_of_memory_splits_the_batch(model: LanguageModel, sick: Sick, reference: LlamaForCausalLM) -> None:
    sick.most = 23
    requests = [greedy(PROMPT[:length], 6, id=str(length)) for length in (23, 20, 9, 3)]
    written = finish(assembled(model).engine, requests)
    assert [written[r.id].tokens[0] for r in requests] == [expected(reference, r.tokens, 6) for r in requests]


def test_what_does_not_fit_alone_fails_alone(model: LanguageModel, sick: Sick) -> None:
    sick.most = 22
    written = finish(assembled(model).engine, [greedy(PROMPT[:5], 6, id="short"), greedy(PROMPT, 6, id="long")])
    end = written["long"].end
    assert isinstance(end, Failed)
    assert isinstance(end.error, OutOfMemoryError)
    assert isinstance(written["short"].end, Completed)


def test_a_defect_fails_the_batch_and_the_engine_goes_on(model: LanguageModel, sick: Sick) -> None:
    sick.raise_at = 25
    assembly = assembled(model)
    written = finish(assembly.engine, [greedy(PROMPT, 20, id="a"), greedy(PROMPT[:5], 20, id="b")])
    assert isinstance(written["a"].end, Failed)
    assert str(written["a"].end.error) == "a pass of the language model failed: RuntimeError"
    assert assembly.pool is not None
    assert assembly.tree is not None
    sick.raise_at = -1
    assert isinstance(finish(assembly.engine, [greedy(PROMPT, 5, id="c")])["c"].end, Completed)
    assembly.tree.evict(assembly.pool.pages)
    assert assembly.pool.free == assembly.pool.pages


def test_the_observer_hears_of_every_pass(model: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []

    class Observer:
        def batch(self, sequences: int, tokens: int, seconds: float) -> None:
            seen.append((sequences, tokens))

    engine = assembled(model).engine
    engine.observer = Observer()
    finish(engine, [greedy(PROMPT, 3, id="a"), greedy(PROMPT[:4], 2, id="b")])
    assert seen == [(2, len(PROMPT) + 4), (2, 2), (1, 1)]
