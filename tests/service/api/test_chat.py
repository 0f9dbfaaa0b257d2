"""Texts over HTTP, by a tiny random model: what clients may ask for, and what becomes of those who leave."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from models.llm.loading import LanguageModel
from service.config import LlmSettings
from service.llm.assembly import KvPlan, assemble
from service.llm.request import LlmRequest, SamplingParams
from service.llm.scheduler import Policy
from service.writer import Writer
from tests.service.llm.tiny import Answer, finish
from tests.service.serving import until
from tests.service.texts import CHAT, KEYS, Writing, tiny_writer, writing

LONG = CHAT | {"max_tokens": 100}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny_writer(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def served(model: LanguageModel) -> Iterator[Writing]:
    with writing(model) as running:
        yield running


@pytest.fixture
def stock(served: Writing) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def post(running: Writing, body: dict[str, Any], path: str = "/v1/chat/completions", key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(running.url + path, json=body, headers=headers, timeout=60)


def told(running: Writing, body: dict[str, Any], **others: str) -> dict[str, Any]:
    reply = post(running, body, **others)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def alone(model: LanguageModel, tokens: list[int], **params: Any) -> Answer:
    """What the engine writes without a service."""
    engine = assemble(model, Policy(max_running=2), KvPlan(budget_bytes=1 << 20)).engine
    return finish(engine, [LlmRequest(id="a", tokens=tuple(tokens), params=SamplingParams(**params))])["a"]


class Gate:
    """Holds the engine's thread after a pass, until opened."""

    def __init__(self, writer: Writer) -> None:
        self.passes = 0
        self.open = threading.Event()
        writer.observe(self)

    def batch(self, sequences: int, tokens: int, seconds: float) -> None:
        self.passes += 1
        assert self.open.wait(30)


def chunks(text: str) -> list[dict[str, Any]]:
    *blocks, done = text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_a_conversation_is_answered_as_the_engine_answers_it(served: Writing, model: LanguageModel) -> None:
    tokens = model.tokenizer.encode_chat(CHAT["messages"])
    expected = alone(model, tokens, temperature=0, max_tokens=12)
    answer = told(served, CHAT | {"max_completion_tokens": 12, "model": "tiny"})
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text[0], "refusal": None}
    assert choice["finish_reason"] == expected.reasons[0]
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(tokens), 12)
    assert usage["total_tokens"] == len(tokens) + 12
    assert 0 < answer["timings"]["first_token_s"] <= answer["timings"]["total_s"]


def test_content_in_parts_and_developers_are_understood(served: Writing) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    plain = told(served, CHAT | {"messages": [{"role": "system", "content": "hi"}], "max_tokens": 5})
    again = told(served, CHAT | {"messages": [{"role": "developer", "content": parts}], "max_tokens": 5})
    assert plain["choices"] == again["choices"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_tells_the_same_in_pieces(served: Writing, path: str) -> None:
    ask = CHAT if "chat" in path else {"prompt": "the 12", "temperature": 0}
    body = ask | {"max_tokens": 20, "n": 2, "temperature": 1, "seed": 5}
    whole = told(served, body, path=path)
    streamed = post(served, body | {"stream": True, "stream_options": {"include_usage": True}}, path=path)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *received, last = chunks(streamed.text)
    texts, reasons = ["", ""], [None, None]
    for chunk in received:
        (choice,) = chunk["choices"]
        assert chunk["usage"] is None
        assert reasons[choice["index"]] is None
        texts[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    key = "message" if "chat" in path else "text"
    expected = [choice[key]["content"] if key == "message" else choice[key] for choice in whole["choices"]]
    assert texts == expected
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({chunk["id"] for chunk in received}) == 1
    assert len(received) > 10


def test_the_stock_client(stock: openai.OpenAI) -> None:
    messages: Any = CHAT["messages"]
    ask: Any = partial(stock.chat.completions.create, model="tiny", messages=messages, max_tokens=8)
    reply = ask(n=2, seed=3, temperature=0.7, top_p=0.9, logprobs=True, top_logprobs=2, user="someone")
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert choice.finish_reason == "length"
        assert len(choice.logprobs.content) == 8
        for entry in choice.logprobs.content:
            assert entry.logprob <= entry.top_logprobs[0].logprob <= 0
            assert len(entry.top_logprobs) == 2
    assert reply.usage.completion_tokens == 16
    pieces = list(ask(n=1, seed=3, temperature=0.7, top_p=0.9, stream=True, stream_options={"include_usage": True}))
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == reply.choices[0].message.content
    assert pieces[-1].usage.total_tokens == pieces[-1].usage.prompt_tokens + 8
    completion = stock.completions.create(model="tiny", prompt="the 12", max_tokens=4, logprobs=1, temperature=0)
    (choice,) = completion.choices
    assert choice.logprobs is not None
    assert [next(iter(top.values())) for top in choice.logprobs.top_logprobs] == choice.logprobs.token_logprobs
    with pytest.raises(openai.NotFoundError) as unknown:
        stock.completions.create(model="gpt-4", prompt="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ask(n=9)
    assert caught.value.param == "n"
    assert [entry.id for entry in stock.models.list()] == ["fake", "tiny"]
    assert stock.models.retrieve("tiny").model_dump()["max_model_len"] == 128


def test_a_seed_is_a_promise_and_choice_i_is_that_of_seed_i(served: Writing) -> None:
    body = {"prompt": "the 12", "max_tokens": 12, "temperature": 1.5}
    (one, two), (again, _) = (
        [choice["text"] for choice in told(served, body | {"seed": 7, "n": 2}, path="/v1/completions")["choices"]]
        for _ in range(2)
    )
    assert one == again != two
    assert told(served, body | {"seed": 8}, path="/v1/completions")["choices"][0]["text"] == two
    random = [told(served, body | {"seed": -1}, path="/v1/completions")["choices"][0]["text"] for _ in range(3)]
    assert len(set(random)) > 1


def test_tokens_are_a_prompt_and_sixteen_the_default(served: Writing, model: LanguageModel) -> None:
    tokens = model.tokenizer.encode("the 12")
    by_text, by_tokens = (
        told(served, {"prompt": prompt, "temperature": 0}, path="/v1/completions") for prompt in ("the 12", tokens)
    )
    assert by_text["choices"] == by_tokens["choices"]
    expected = alone(model, tokens, temperature=0, max_tokens=16)
    assert by_text["choices"][0]["text"] == expected.text[0]


def test_a_conversation_may_fill_the_context(served: Writing) -> None:
    answer = told(served, CHAT | {"repetition_penalty": 1.3, "min_p": 0.01, "top_k": 50, "temperature": 1, "seed": 1})
    usage = answer["usage"]
    assert usage["total_tokens"] == 128 or answer["choices"][0]["finish_reason"] == "stop"


def test_stop_strings_end_a_text_and_are_left_out(served: Writing) -> None:
    body = {"prompt": "the 12", "max_tokens": 24, "temperature": 0}
    text = told(served, body, path="/v1/completions")["choices"][0]["text"]
    stop = text[3:5]
    (choice,) = told(served, body | {"stop": stop}, path="/v1/completions")["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    (same,) = told(served, body | {"stop": ["never comes", stop]}, path="/v1/completions")["choices"]
    assert same == choice


def test_an_end_of_text_is_no_text(model: LanguageModel, served: Writing) -> None:
    """With every token as likely as any other, some text ends soon."""
    for seed in range(200):
        body = {"prompt": "a", "temperature": 2, "max_tokens": 100, "seed": seed, "logprobs": 0}
        (choice,) = told(served, body, path="/v1/completions")["choices"]
        if choice["finish_reason"] == "stop":
            assert "<|im_end|>" not in choice["logprobs"]["tokens"]
            assert len(choice["logprobs"]["tokens"]) < 100
            return
    raise AssertionError("no text has ended")


WRONG_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "a list of one or more"),
    ({"messages": "hi"}, "messages", "a list of one or more"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role", "system, developer, user or assistant"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "text"),
    ({"messages": [{"role": "user", "content": "a", "tool": 1}]}, "messages.0.tool", "content, name, role"),
    ({"messages": [{"role": "user", "content": "a" * 300}]}, "messages", "at most 127 are allowed"),
    ({"n": 0}, "n", "1 to 128"),
    ({"n": 129}, "n", "1 to 128"),
    ({"n": 5}, "n", "at most 4"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 108}, "max_tokens", "at most 107: the prompt has 21 tokens of 128"),
    ({"max_completion_tokens": 108}, "max_completion_tokens", "at most 107"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "the same as max_tokens, 5"),
    ({"temperature": 2.1}, "temperature", "0 to 2"),
    ({"temperature": "hot"}, "temperature", "0 (the likeliest) to 2"),
    ({"top_p": 0}, "top_p", "above 0, at most 1"),
    ({"top_k": -1}, "top_k", "0 for all tokens"),
    ({"min_p": 1.5}, "min_p", "0 to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0, at most 10"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "see repetition_penalty"),
    ({"presence_penalty": -1}, "presence_penalty", "see repetition_penalty"),
    ({"stop": ""}, "stop", "at least one character"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"seed": -2}, "seed", "0 to 4294967295"),
    ({"top_logprobs": 2}, "top_logprobs", "left out unless logprobs is true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
    ({"logprobs": 2}, "logprobs", "true or false"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "left out unless stream is true"),
    ({"stream_options": {"usage": True}, "stream": True}, "stream_options.usage", "include_usage"),
    ({"priority": 11}, "priority", "-10 to 10"),
    ({"deadline_s": 0}, "deadline_s", "above 0"),
    ({"user": 3}, "user", "text"),
    ({"tools": []}, "tools", "unknown field"),
    ({"model": 3}, "model", "GET /v1/models"),
]
WRONG_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": 3}, "prompt", "text, or a list of token ids"),
    ({"prompt": ["a", "b"]}, "prompt", "text, or a list of token ids"),
    ({"prompt": ""}, "prompt", "at least one token"),
    ({"prompt": []}, "prompt", "at least one token"),
    ({"prompt": [1, 288]}, "prompt", "0 to 287"),
    ({"prompt": [1] * 128}, "prompt", "at most 127 are allowed"),
    ({"logprobs": 21}, "logprobs", "0 to 20"),
    ({"echo": True}, "echo", "false"),
]


@pytest.mark.parametrize(("change", "param", "allowed"), WRONG_CHATS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_chats(served: Writing, change: dict[str, Any], param: str, allowed: str, stream: bool) -> None:
    if stream and ("stream" in change or "stream_options" in change):
        change = change | {"stream": change.get("stream", False)}
    reply = post(served, CHAT | {"stream": stream} | change)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (422, "invalid_request_error", param)
    assert allowed in error["message"]


@pytest.mark.parametrize(("change", "param", "allowed"), WRONG_COMPLETIONS, ids=lambda value: str(value)[:40])
def test_wrong_completions(served: Writing, change: dict[str, Any], param: str, allowed: str) -> None:
    reply = post(served, {"prompt": "a"} | change, "/v1/completions")
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (422, param)
    assert allowed in error["message"]


def test_what_can_never_fit_is_refused_and_what_fits_runs_alone(model: LanguageModel) -> None:
    with writing(model, LlmSettings(kv_pages=2)) as running:
        reply = post(running, CHAT | {"max_tokens": 12})
        assert reply.status_code == 422
        assert "at most 11: the prompt has 21 tokens of 32" in reply.json()["error"]["message"]
        with ThreadPoolExecutor(6) as pool:  # pages for one of them at a time
            answers = list(pool.map(lambda _: told(running, CHAT | {"max_tokens": 11}), range(6)))
        assert len({json.dumps(answer["choices"]) for answer in answers}) == 1


def test_a_full_queue_says_when_to_come_again(model: LanguageModel) -> None:
    # A request is told as started when the pass ends that the gate holds: till then it takes a place as well.
    with writing(model, LlmSettings(max_running=1, max_waiting=2)) as running, ThreadPoolExecutor(2) as pool:
        gate = Gate(running.writer)
        first = pool.submit(told, running, CHAT | {"max_tokens": 3})
        until(lambda: gate.passes == 1)
        second = pool.submit(told, running, CHAT | {"max_tokens": 3})
        until(lambda: running.writer.bridge.stats.waiting == 2)
        refused = [post(running, CHAT | {"n": 1}), post(running, CHAT | {"stream": True})]
        gate.open.set()
        assert first.result()["choices"] == second.result()["choices"]
        metrics = httpx.get(f"{running.url}/metrics").text.splitlines()
    for reply in refused:
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert "answers wait" in reply.json()["error"]["message"]
    assert 'headstart_llm_requests_total{outcome="rejected"} 2.0' in metrics
    assert 'headstart_llm_requests_total{outcome="completed"} 2.0' in metrics


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_pages_within_a_step(served: Writing, stream: bool) -> None:
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    gate = Gate(served.writer)
    try:
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(head + body)
            until(lambda: gate.passes == 1)
            assert served.writer.figures.pages_used > 0
        bridge = served.writer.bridge
        until(lambda: bool(bridge._commands))  # the abort waits for the end of the step that the gate holds
        gate.open.set()
        until(lambda: bridge.stats == (0, 0))
        assert gate.passes == 1
        assert served.writer.figures.pages_used == 0
    finally:
        gate.open.set()
        served.writer.observe(served.service.metrics)
    text = httpx.get(f"{served.url}/metrics").text
    assert 'headstart_llm_requests_total{outcome="cancelled"}' in text


def test_a_deadline_fails_a_request(served: Writing) -> None:
    gate = Gate(served.writer)
    try:
        threading.Timer(0.3, gate.open.set).start()
        reply = post(served, LONG | {"deadline_s": 0.1})
    finally:
        served.writer.observe(served.service.metrics)
    assert (reply.status_code, reply.json()["error"]["param"]) == (504, "deadline_s")


def test_a_failure_midway_is_told_in_the_stream(served: Writing, stock: openai.OpenAI) -> None:
    gate = Gate(served.writer)
    try:
        threading.Timer(0.3, gate.open.set).start()
        messages: Any = CHAT["messages"]
        extra = {"deadline_s": 0.1}
        with (
            stock.chat.completions.create(model="tiny", messages=messages, stream=True, extra_body=extra) as pieces,
            pytest.raises(openai.APIError) as caught,
        ):
            list(pieces)
    finally:
        served.writer.observe(served.service.metrics)
    assert caught.value.code == "deadline_exceeded"


def test_metrics_and_health_tell_of_texts_and_never_name_one(served: Writing) -> None:
    told(served, CHAT | {"messages": [{"role": "user", "content": "a very private fox"}], "max_tokens": 3})
    text = httpx.get(f"{served.url}/metrics").text
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    assert values['headstart_llm_tokens_total{kind="prompt"}'] > values['headstart_llm_tokens_total{kind="cached"}'] > 0
    assert values['headstart_llm_tokens_total{kind="generated"}'] >= 3
    assert values["headstart_kv_pages"] == served.assembly.figures.pages
    assert values["headstart_kv_pages_used"] == 0
    assert values["headstart_kv_pages_kept"] > 0
    assert values['headstart_stage_latency_seconds_count{stage="llm"}'] > 0
    assert values["headstart_llm_first_token_seconds_count"] > 0
    assert "private" not in text
    ready = httpx.get(f"{served.url}/health/ready").json()
    assert ready == {"status": "ready", "model": "fake", "language_model": "tiny"}


def test_openapi_describes_the_bodies(served: Writing) -> None:
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    schemas = {
        path: paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path in ("/v1/chat/completions", "/v1/completions", "/rewrite")
    }
    assert [schema["required"] for schema in schemas.values()] == [["messages"], ["prompt"], ["prompt"]]
    assert "$ref" not in str(schemas)
    assert "developer" in str(schemas["/v1/chat/completions"])


def test_tenants_share_no_prefixes_and_forget_only_their_own(model: LanguageModel) -> None:
    def cached(key: str) -> int:
        body = CHAT | {"messages": [{"role": "user", "content": "one and the same long question " * 2}]}
        usage = told(running, body | {"max_tokens": 2}, key=key)["usage"]
        count: int = usage["prompt_tokens_details"]["cached_tokens"]
        return count

    with writing(model, tenants=True) as running:
        ada, bob = (key for _, key in KEYS)
        assert cached(ada) == 0
        assert cached(ada) > 16
        assert cached(bob) == 0
        assert cached(bob) > 16
        forgotten = httpx.delete(f"{running.url}/cache", headers={"Authorization": f"Bearer {ada}"}).json()
        assert forgotten["prefix_pages"] > 0
        assert cached(bob) > 16
        assert cached(ada) == 0


def test_a_dead_language_model_takes_no_picture_with_it(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with writing(model) as running:
        monkeypatch.setattr(running.assembly.engine, "step", lambda: {}["a fault"])
        reply = post(running, CHAT)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")
        assert post(running, CHAT).json()["error"]["code"] == "engine_dead"
        assert post(running, {"prompt": "a"}, "/rewrite").status_code == 503
        drawn = told(running, {"prompt": "a fox", "enhance_prompt": True}, path="/generate")
        assert drawn["data"][0]["revised_prompt"] == "a fox"
        assert drawn["data"][0]["rewrite"]["outcome"] == "failed"
        assert "KeyError" in drawn["data"][0]["rewrite"]["reason"]
        ready = httpx.get(f"{running.url}/health/ready").json()
        assert ready["language_model"] == "stopped"


@pytest.mark.parametrize("backend", ["paged", "virtual"])
def test_a_shutdown_lets_answers_finish_and_leaves_no_thread(model: LanguageModel, backend: str) -> None:
    before = set(threading.enumerate())
    settings = LlmSettings(max_running=2, kv_backend=backend)
    with writing(model, settings, shutdown_grace_s=20.0) as running, ThreadPoolExecutor(1) as pool:
        expected = told(running, LONG)["choices"]
        gate = Gate(running.writer)
        answer = pool.submit(told, running, LONG)
        until(lambda: gate.passes == 1)
        running.server.should_exit = True
        until(lambda: running.service.draining)
        refused = post(running, LONG)
        gate.open.set()
        assert answer.result()["choices"] == expected
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left & {"llm", "engine", "slot-pages"}


def test_a_shutdown_answers_what_its_grace_does_not_suffice_for(model: LanguageModel) -> None:
    with writing(model, shutdown_grace_s=0.1) as running, ThreadPoolExecutor(1) as pool:
        gate = Gate(running.writer)
        answer = pool.submit(post, running, LONG)
        until(lambda: gate.passes == 1)
        running.server.should_exit = True
        until(lambda: running.service.draining)
        time.sleep(0.2)
        gate.open.set()
        reply = answer.result()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
