"""Prompts rewritten over HTTP: by the default language model before pictures are drawn, and what happens without it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from models.llm.loading import load_llm
from service.config import CacheSettings, EngineSettings, LlmSettings, ModelSettings, ServerSettings, Settings
from service.pictures import read_recipe
from service.runtime import open_warm_runtime
from tests.service.api.test_chat import Gate
from tests.service.cached import KEYS, bundle, client_of, until_kept
from tests.service.llm.tiny import llama
from tests.service.serving import listening, serving, until
from tests.service.texts import tiny_writer, writing

STEPS = {"sampler": "ddim", "num_inference_steps": 10}
TYPED, DRAWN = "puppy on yelow", "a puppy on yelow"
REWRITTEN = {"outcome": "rewritten", "reason": ""}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Both real engines, a tiny image model with a cache and SmolLM2, opened as `serve` does."""
    folder = tmp_path_factory.mktemp("rewriting")
    settings = Settings(
        server=ServerSettings(api_keys=KEYS),
        model=ModelSettings(model=str(bundle(folder / "tiny")), dtype="float32", device="cpu"),
        engine=EngineSettings(max_pixels=128 * 128),
        cache=CacheSettings(folder=folder / "latents"),
        llm=LlmSettings(enabled="on", dtype="float32", kv_pages=128, max_running=4, rewrite_budget_s=60),
    )
    threads, before = torch.get_num_threads(), set(threading.enumerate())
    torch.set_num_threads(1)
    try:
        opener = lambda given, metrics: open_warm_runtime(given, metrics, cached=True, writing=True)  # noqa: E731
        with listening(settings, opener) as (url, _):
            yield url
    finally:
        torch.set_num_threads(threads)
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left & {"engine", "llm"}


@pytest.fixture
def ada(url: str) -> Iterator[httpx.Client]:
    with client_of(url, "ada") as client:
        yield client


def test_a_prompt_is_rewritten_or_kept_and_the_reply_says_which(ada: httpx.Client) -> None:
    outcomes = {}
    for prompt in (TYPED, "a red apple", "kitty n a hat pls, bluish"):
        reply = ada.post("/rewrite", json={"prompt": f" {prompt}\n"})
        assert reply.status_code == 200
        answer = reply.json()
        assert answer["prompt"] == prompt
        assert answer["model"] == "smollm2-135m-instruct"
        assert answer["timings"]["rewrite_s"] > 0
        outcomes[prompt] = (answer["rewrite"]["outcome"], answer["revised_prompt"])
    assert outcomes == {
        TYPED: ("rewritten", DRAWN),
        "a red apple": ("unchanged", "a red apple"),
        "kitty n a hat pls, bluish": ("guarded", "kitty n a hat pls, bluish"),
    }


def test_a_picture_is_drawn_from_what_its_prompt_was_rewritten_to(ada: httpx.Client, tmp_path: Path) -> None:
    body = STEPS | {"prompt": TYPED, "seed": 3, "cache": "bypass"}
    enhanced, plain, direct = (
        ada.post("/generate", json=body | change).json() for change in ({"enhance_prompt": True}, {}, {"prompt": DRAWN})
    )
    (entry,) = enhanced["data"]
    assert (entry["prompt"], entry["revised_prompt"], entry["rewrite"]) == (TYPED, DRAWN, REWRITTEN)
    assert entry["b64_json"] == direct["data"][0]["b64_json"] != plain["data"][0]["b64_json"]
    assert 0 < enhanced["timings"]["rewrite_s"] < enhanced["timings"]["total_s"]
    assert plain["timings"]["rewrite_s"] == 0
    assert plain["data"][0]["revised_prompt"] == TYPED
    assert "rewrite" not in plain["data"][0]
    (tmp_path / "a.png").write_bytes(base64.b64decode(entry["b64_json"]))
    assert read_recipe(tmp_path / "a.png").prompt == DRAWN


def test_paraphrases_meet_in_the_cache(ada: httpx.Client) -> None:
    def result(prompt: str, enhance: bool) -> dict[str, Any]:
        body = STEPS | {"prompt": prompt, "enhance_prompt": enhance}
        facts: dict[str, Any] = ada.post("/generate", json=body).json()["data"][0]["cache"]
        return facts

    ada.delete("/cache")
    assert result(TYPED, True)["result"] == "miss"
    until_kept(ada, 1)
    assert (result(DRAWN, False)["result"], result(DRAWN, False)["similarity"]) == ("hit", 1.0)
    assert result(TYPED, True)["similarity"] == 1.0


def test_every_kind_of_reply_tells_the_revised_prompt(ada: httpx.Client, url: str) -> None:
    body = STEPS | {"prompt": TYPED, "enhance_prompt": True, "cache": "bypass"}
    headers = ada.post("/generate", json=body, headers={"Accept": "image/png"}).headers
    assert (headers["x-headstart-rewrite"], headers["x-headstart-revised-prompt"]) == (
        "rewritten",
        "a%20puppy%20on%20yelow",
    )
    text = ada.post("/generate", json=body | {"stream": True}).text
    events = [json.loads(block.partition("data: ")[2]) for block in text.strip().split("\n\n")]
    done = next(event for event in events if event["type"] == "image_generation.completed")
    assert (done["prompt"], done["revised_prompt"], done["rewrite"]) == (TYPED, DRAWN, REWRITTEN)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=dict(KEYS)["ada"], max_retries=0) as stock:
        extra = STEPS | {"enhance_prompt": True}
        reply = stock.images.generate(prompt=TYPED, extra_body=extra)
        assert reply.data is not None
        assert reply.data[0].revised_prompt == DRAWN
        chat = stock.chat.completions.create(
            model="smollm2-135m-instruct",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=12,
            temperature=0,
        )
        assert "Paris" in (chat.choices[0].message.content or "")


def test_what_all_prompts_begin_with_is_read_once_for_each_tenant(ada: httpx.Client, url: str) -> None:
    def cached() -> tuple[float, float]:
        lines = dict(line.rsplit(" ", 1) for line in ada.get("/metrics").text.splitlines() if line[0] != "#")
        name = 'headstart_llm_tokens_total{kind="%s"}'
        return float(lines[name % "prompt"]), float(lines[name % "cached"])

    def share(client: httpx.Client, prompt: str) -> float:
        before = cached()
        assert client.post("/rewrite", json={"prompt": prompt}).status_code == 200
        prompt_tokens, cached_tokens = (after - earlier for earlier, after in zip(before, cached(), strict=True))
        return cached_tokens / prompt_tokens

    share(ada, "a cat")
    assert share(ada, "a small dog") > 0.9
    with client_of(url, "bob") as bob:
        bob.delete("/cache")
        assert share(bob, "a small dog") == 0
        assert share(bob, "a green tree") > 0.9
        assert bob.delete("/cache").json()["prefix_pages"] > 10


def test_without_a_language_model_prompts_stay_as_they_are() -> None:
    with serving() as running:
        reply = httpx.post(
            f"{running.url}/generate", json={"prompt": "a fox", "enhance_prompt": True}, timeout=60
        ).json()
        refused = [
            httpx.post(running.url + path, json=body, timeout=60)
            for path, body in (
                ("/rewrite", {"prompt": "a"}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
                ("/v1/completions", {"prompt": "a"}),
            )
        ]
        metrics = httpx.get(f"{running.url}/metrics").text
    (entry,) = reply["data"]
    assert entry["revised_prompt"] == "a fox"
    assert entry["rewrite"] == {"outcome": "unavailable", "reason": "no language model is loaded"}
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_language_model")
    assert 'headstart_rewrites_total{outcome="unavailable"} 1.0' in metrics


def test_a_caption_that_comes_too_late_is_not_waited_for(tmp_path: Path) -> None:
    model = tiny_writer(tmp_path, max_position_embeddings=2048)
    with writing(model, LlmSettings(rewrite_budget_s=0.2)) as running:
        gate = Gate(running.writer)
        reply = httpx.post(
            f"{running.url}/generate", json={"prompt": "a fox", "enhance_prompt": True}, timeout=60
        ).json()
        gate.open.set()
        until(lambda: running.writer.bridge.stats == (0, 0))
        assert running.writer.figures.pages_used == 0
    (entry,) = reply["data"]
    assert entry["revised_prompt"] == "a fox"
    assert entry["rewrite"] == {"outcome": "timed_out", "reason": "no caption within 0.2 s"}
    assert 0.2 <= reply["timings"]["rewrite_s"] < 10


def test_a_shutdown_lets_a_prompt_be_rewritten_and_drawn(tmp_path: Path) -> None:
    model = tiny_writer(tmp_path, max_position_embeddings=2048)
    settings = LlmSettings(rewrite_budget_s=20)
    with writing(model, settings, shutdown_grace_s=20.0) as running, ThreadPoolExecutor(1) as pool:
        gate = Gate(running.writer)
        body = {"prompt": "a fox", "enhance_prompt": True}
        drawing = pool.submit(httpx.post, f"{running.url}/generate", json=body, timeout=30)
        until(lambda: gate.passes == 1)
        running.server.should_exit = True
        until(lambda: running.service.draining)
        gate.open.set()
        reply = drawing.result()
    assert reply.status_code == 200
    assert reply.json()["data"][0]["rewrite"]["outcome"] == "guarded"  # what a random model writes is no caption


def test_a_model_that_cannot_chat_completes_and_rewrites_nothing(tmp_path: Path) -> None:
    model = load_llm(str(llama(tmp_path)), dtype="float32", device="cpu", cache_dir=tmp_path)
    with writing(model) as running:
        chat = httpx.post(
            f"{running.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}, timeout=60
        )
        completion = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a"}, timeout=60)
        rewritten = httpx.post(f"{running.url}/rewrite", json={"prompt": "a fox"}, timeout=60).json()
    assert (chat.status_code, chat.json()["error"]["param"]) == (422, "messages")
    assert "no chat template" in chat.json()["error"]["message"]
    assert completion.status_code == 200
    assert (rewritten["revised_prompt"], rewritten["rewrite"]["outcome"]) == ("a fox", "failed")
    assert "no chat template" in rewritten["rewrite"]["reason"]


def test_a_rewriter_with_a_full_queue_keeps_prompts(tmp_path: Path) -> None:
    model = tiny_writer(tmp_path, max_position_embeddings=2048)
    with writing(model, LlmSettings(max_waiting=0)) as running:
        refused = httpx.post(f"{running.url}/rewrite", json={"prompt": "a fox"}, timeout=60)
        reply = httpx.post(
            f"{running.url}/generate", json={"prompt": "a fox", "enhance_prompt": True}, timeout=60
        ).json()
        metrics = httpx.get(f"{running.url}/metrics", timeout=60).text
    assert 'headstart_llm_requests_total{outcome="rejected"} 1.0' in metrics
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    (entry,) = reply["data"]
    assert (entry["revised_prompt"], entry["rewrite"]["outcome"]) == ("a fox", "failed")
    assert "answers wait" in entry["rewrite"]["reason"]


@pytest.mark.parametrize(
    ("body", "param"),
    [({"prompt": ""}, "prompt"), ({"prompt": "a" * 2001}, "prompt"), ({"prompt": "a", "text": "b"}, "text")],
)
def test_what_is_no_prompt_is_refused(ada: httpx.Client, body: dict[str, str], param: str) -> None:
    reply = ada.post("/rewrite", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, param)
