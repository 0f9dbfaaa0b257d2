"""The latent cache over HTTP: what a mode does, what a reply tells, and that tenants stay among themselves."""

from __future__ import annotations

import base64
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from service.pictures import read_recipe
from tests.service.cached import KEYS, STEPS, bundle, client_of, draw, serving_cached, until_kept
from tests.service.serving import Running

RED = "a red apple on a blue background"
MISS = {"result": "miss", "similarity": None, "steps_skipped": 0, "steps_run": 10}
BYPASS = MISS | {"result": "bypass"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("cached") / "tiny")


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_cached(model, tmp_path_factory.mktemp("latents"), tenants=True) as url:
        yield url


@pytest.fixture
def ada(url: str) -> Iterator[httpx.Client]:
    with client_of(url, "ada") as client:
        client.delete("/cache")
        yield client


@pytest.fixture
def bob(url: str) -> Iterator[httpx.Client]:
    with client_of(url, "bob") as client:
        client.delete("/cache")
        yield client


def test_a_picture_starts_from_what_the_same_prompt_left(ada: httpx.Client, tmp_path: Path) -> None:
    assert draw(ada, RED) == MISS
    until_kept(ada, 1)
    told = draw(ada, f" {RED}\n")
    assert (told["result"], told["similarity"]) == ("hit", 1.0)
    assert told["steps_skipped"] > 0
    assert told["steps_skipped"] + told["steps_run"] == 10
    reply = ada.post("/generate", json=STEPS | {"prompt": RED}, headers={"Accept": "image/png"})
    assert reply.headers["x-headstart-cache"] == "hit"
    assert reply.headers["x-headstart-similarity"] == "1.0"
    assert reply.headers["x-headstart-steps-skipped"] == str(told["steps_skipped"])
    (tmp_path / "apple.png").write_bytes(reply.content)
    assert read_recipe(tmp_path / "apple.png").parameters["Cache"] == f"{told['steps_skipped']} of 10 steps skipped"


def test_a_reply_tells_of_every_picture_and_what_the_lookup_took(ada: httpx.Client) -> None:
    draw(ada, RED)
    until_kept(ada, 1)
    answer = ada.post("/generate", json=STEPS | {"prompt": RED, "n": 3}).json()
    for entry in answer["data"]:
        assert entry["cache"]["result"] == "hit"
        assert (entry["steps_run"], entry["steps_skipped"]) == (
            entry["cache"]["steps_run"],
            entry["cache"]["steps_skipped"],
        )
        assert entry["evaluations"] == 2 * entry["steps_run"]
    assert 0 < answer["timings"]["lookup_s"] <= answer["timings"]["total_s"]


def test_modes(ada: httpx.Client) -> None:
    assert draw(ada, RED, cache="bypass") == BYPASS
    assert draw(ada, RED, cache="use", seed=1) == MISS  # neither did the first leave anything
    before = until_kept(ada, 1)["stored"]
    assert draw(ada, RED, cache="use", seed=1)["result"] == "hit"
    assert draw(ada, RED, cache="auto", seed=-1)["result"] == "hit"
    assert draw(ada, RED, cache="auto", seed=1) == BYPASS
    assert draw(ada, RED, cache="bypass") == BYPASS
    assert draw(ada, RED, cache="refresh") == BYPASS
    end = time.monotonic() + 10
    while (stats := until_kept(ada, 1))["stored"] == before:  # in place of the one that was there
        assert time.monotonic() < end
    assert stats["stored"] == before + 1


def test_a_named_seed_draws_the_same_picture_again(ada: httpx.Client) -> None:
    body = STEPS | {"prompt": RED, "seed": 5}
    first = ada.post("/generate", json=body).json()["data"][0]["b64_json"]
    draw(ada, RED)
    until_kept(ada, 1)
    assert ada.post("/generate", json=body).json()["data"][0]["b64_json"] == first


def test_streams_tell_it_too(ada: httpx.Client) -> None:
    draw(ada, RED)
    until_kept(ada, 1)
    with ada.stream("POST", "/generate", json=STEPS | {"prompt": RED, "stream": True}) as reply:
        data = [json.loads(line.removeprefix("data: ")) for line in reply.iter_lines() if line.startswith("data: ")]
    told = {message["type"]: message for message in data}
    assert told["image_generation.completed"]["cache"]["result"] == "hit"
    assert told["headstart.completed"]["timings"]["lookup_s"] > 0
    steps = [message["step"] for message in data if message["type"] == "headstart.progress"]
    assert steps[0] == told["image_generation.completed"]["steps_skipped"] + 1
    assert steps[-1] == 10


def test_a_stock_openai_client_can_say_how(ada: httpx.Client, url: str) -> None:
    draw(ada, RED)
    until_kept(ada, 1)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=dict(KEYS)["ada"], max_retries=0) as stock:
        for mode, result in (("use", "hit"), ("bypass", "bypass")):
            reply = stock.images.generate(prompt=RED, extra_body=STEPS | {"cache": mode, "seed": 3})
            assert reply.data is not None
            assert reply.data[0].cache["result"] == result  # type: ignore[attr-defined]


def test_figures_of_a_tenant(ada: httpx.Client) -> None:
    before = ada.get("/cache").json()
    draw(ada, RED)
    until_kept(ada, 1)
    skipped = draw(ada, RED, n=2)["steps_skipped"]
    stats = ada.get("/cache").json()
    assert (stats["enabled"], stats["tenant"], stats["entries"]) == (True, "ada", 1)
    assert stats["bytes"] > 4 * 8 * 8 * 2
    assert stats["lookups"]["hit"] == before["lookups"]["hit"] + 2
    assert stats["lookups"]["miss"] == before["lookups"]["miss"] + 1
    assert stats["steps_saved"] == before["steps_saved"] + 2 * skipped
    assert 0 < stats["hit_rate"] < 1
    assert sum(stats["hit_rate_by_k"].values()) == pytest.approx(stats["hit_rate"], abs=1e-3)


def test_purging(ada: httpx.Client) -> None:
    draw(ada, RED)
    draw(ada, "two dogs", guidance_scale=2.0)
    until_kept(ada, 2)
    assert ada.delete("/cache", params={"prompt": "a green cat"}).json() == {"tenant": "ada", "purged": 0}
    assert ada.delete("/cache", params={"prompt": f"{RED} "}).json() == {"tenant": "ada", "purged": 1}
    assert draw(ada, "two dogs", guidance_scale=2.0)["result"] == "hit"
    assert ada.delete("/cache").json()["purged"] == 1
    assert ada.delete("/cache").json()["purged"] == 0
    assert draw(ada, "two dogs", guidance_scale=2.0) == MISS


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    ("query", "param", "told"),
    [
        ("promt=a", "promt", "unknown parameter; the parameters are"),
        ("tenant=bob", "tenant", "'bob' is not allowed; ada, whose key was sent"),
        ("tenant=nobody", "tenant", "'nobody' is not allowed; ada, whose key was sent"),
        ("tenant=", "tenant", "'' is not allowed; ada, whose key was sent"),
        ("tenant=ada&tenant=bob", "tenant", "given once"),
    ],
)
def test_parameters_that_are_refused(ada: httpx.Client, method: str, query: str, param: str, told: str) -> None:
    reply = ada.request(method, f"/cache?{query}")
    assert reply.status_code == 422
    assert reply.json()["error"]["param"] == param
    assert told in reply.json()["error"]["message"]


def test_a_purge_of_no_prompt_in_particular_is_refused(ada: httpx.Client) -> None:
    assert ada.delete("/cache?prompt=%20").status_code == 422
    assert ada.get("/cache?tenant=ada").status_code == 200


# Between tenants.


def test_no_tenant_hits_lists_or_purges_anothers(ada: httpx.Client, bob: httpx.Client) -> None:
    draw(ada, RED)
    until_kept(ada, 1)
    before = bob.get("/cache").json()
    for mode in ("auto", "use"):
        assert draw(bob, RED, cache=mode, seed=-1) == MISS
        bob.delete("/cache")
    assert before["entries"] == before["bytes"] == 0
    for params in ({}, {"prompt": RED}):
        assert bob.delete("/cache", params=params).json() == {"tenant": "bob", "purged": 0}
    told = ada.get("/cache").json()
    assert told["entries"] == 1
    assert draw(ada, RED)["result"] == "hit"
    draw(bob, RED, cache="refresh")
    until_kept(bob, 1)
    assert ada.delete("/cache").json()["purged"] == 1
    assert draw(ada, RED)["result"] == "miss"
    assert until_kept(bob, 1)["tenant"] == "bob"


PAIRS = 40
LEAST, MOST = 0.15, 0.85  # of PAIRS throws of a coin: outside of this once in 100,000 tests


def timings(client: httpx.Client, prompt: str, result: str) -> dict[str, float]:
    """Seconds, as the reply tells them and as the client sees them. Negative prompts give each prompt its own space."""
    body = STEPS | {"prompt": prompt, "negative_prompt": f"not {prompt}", "cache": "use"}
    begun = time.perf_counter()
    answer = client.post("/generate", json=body).json()
    seen = time.perf_counter() - begun
    assert answer["data"][0]["cache"]["result"] == result
    return {name: answer["timings"][name] for name in ("encode_s", "lookup_s", "total_s")} | {"seen_s": seen}


def test_no_tenant_can_time_anothers(ada: httpx.Client, bob: httpx.Client) -> None:
    """Whether ada has a prompt's entry, embedding or text states must not show in the time that it takes bob.

    Pairs of requests, one of them for what ada has just drawn, in random order: how often is that one the faster?
    """
    order = random.Random(1)
    faster: dict[str, Counter[str]] = {"ada": Counter(), "bob": Counter()}
    for i in range(100, 100 + PAIRS):
        words = order.sample(("apple", "zebra", "melon"), 3)  # so that no word's own time counts
        timings(ada, f"{words[0]} number {i}", "miss")
        until_kept(ada, 2 * (i - 100) + 1)
        for name, client, fresh in (("bob", bob, words[1]), ("ada", ada, words[2])):
            asked = [(f"{words[0]} number {i}", "miss" if client is bob else "hit"), (f"{fresh} number {i}", "miss")]
            took = {prompt: timings(client, prompt, result) for prompt, result in order.sample(asked, 2)}
            known, unknown = (took[prompt] for prompt, _ in asked)
            faster[name].update(stage for stage in known if known[stage] < unknown[stage])
        until_kept(ada, 2 * (i - 100) + 2)
    for stage in ("encode_s", "lookup_s", "total_s", "seen_s"):
        assert LEAST < faster["bob"][stage] / PAIRS < MOST, stage
    for stage in ("encode_s", "total_s", "seen_s"):  # it does show in the time that it takes ada
        assert faster["ada"][stage] / PAIRS > 0.75, stage


def test_without_a_key_there_is_no_cache_to_see(url: str) -> None:
    for headers in ({}, {"X-API-Key": "key-of-eve"}, {"X-API-Key": "ada"}):
        for method in ("GET", "DELETE"):
            reply = httpx.request(method, f"{url}/cache", headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


def test_the_source_prompt_is_in_no_reply(
    ada: httpx.Client, url: str, caplog: pytest.LogCaptureFixture, model: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "a red apple and zebra stripes"
    draw(ada, secret)
    until_kept(ada, 1)
    near = "a red apple and zebra stripe"
    reply = ada.post("/generate", json=STEPS | {"prompt": near})
    entry = reply.json()["data"][0]
    assert entry["cache"]["result"] == "hit"
    assert 0.65 < entry["cache"]["similarity"] < 1
    picture = ada.post("/generate", json=STEPS | {"prompt": near}, headers={"Accept": "image/png"})
    told = [reply.text, base64.b64decode(entry["b64_json"]).decode("latin-1"), picture.content.decode("latin-1")]
    told += [str(picture.headers), ada.get("/cache").text, ada.get("/metrics").text, caplog.text]
    assert near in picture.content.decode("latin-1")
    assert not [text for text in told if secret in text]
    assert "ada" not in ada.get("/metrics").text


def test_tenants_share_only_where_the_operator_chose_that(model: Path, tmp_path: Path) -> None:
    with (
        serving_cached(model, tmp_path, tenants=True, shared=True) as url,
        client_of(url, "ada") as ada,
        client_of(url, "bob") as bob,
    ):
        draw(ada, RED)
        until_kept(bob, 1)
        assert draw(bob, RED)["result"] == "hit"
        refused = bob.delete("/cache")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "shared_cache")
        assert bob.delete("/cache", params={"prompt": RED}).json()["purged"] == 1
        assert draw(ada, RED) == MISS


# Beginning, trouble and end.


def test_a_server_hits_what_the_one_before_it_stored(model: Path, tmp_path: Path) -> None:
    with serving_cached(model, tmp_path) as url, client_of(url) as client:
        assert draw(client, RED) == MISS
    with serving_cached(model, tmp_path) as url, client_of(url) as client:
        assert client.get("/cache").json()["entries"] == 1
        assert draw(client, RED)["result"] == "hit"
        lines = client.get("/metrics").text.splitlines()
    for line in (
        'headstart_cache_lookups_total{result="hit"} 1.0',
        "headstart_cache_entries 1.0",
        'headstart_cache_changes_total{change="stored"} 0.0',
        "headstart_cache_errors_total 0.0",
        'headstart_stage_latency_seconds_count{stage="embed"} 1.0',
        'headstart_stage_latency_seconds_count{stage="lookup"} 1.0',
    ):
        assert line in lines
    assert "headstart_steps_skipped_total 0.0" not in lines


def test_a_cache_in_trouble_costs_hits_only_and_heals(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latents").write_text("no folder")
    with serving_cached(model, tmp_path / "latents") as url, client_of(url) as client:
        assert draw(client, RED) == MISS
        assert "headstart_cache_errors_total 0.0" not in client.get("/metrics").text
        assert client.delete("/cache").json()["purged"] == 0
        (tmp_path / "latents").unlink()
        end = time.monotonic() + 20
        while draw(client, RED)["result"] != "hit":
            assert time.monotonic() < end
            time.sleep(0.2)
    assert [record for record in caplog.records if "Not a directory" in record.getMessage()]


def test_redis_that_is_not_there(model: Path, tmp_path: Path) -> None:
    with serving_cached(model, tmp_path, redis_url="redis://127.0.0.1:1/0") as url, client_of(url) as client:
        assert [draw(client, RED) for _ in range(2)] == [MISS] * 2
        assert "headstart_cache_errors_total 0.0" not in client.get("/metrics").text
        assert client.delete("/cache").json()["purged"] == 0
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_cannot_be_embedded_is_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from models.scorer.embedder import Embedder

    monkeypatch.setattr(Embedder, "embed", lambda self, *given: 1 / 0)
    with serving_cached(model, tmp_path) as url, client_of(url) as client:
        assert [draw(client, RED) for _ in range(2)] == [BYPASS] * 2
    assert caplog.text.count("a prompt could not be embedded") == 1


def test_faults_of_the_cache_are_a_metric(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cache.latent.lookup import LatentCache

    monkeypatch.setattr(LatentCache, "find", lambda self, *given: 1 / 0)
    with serving_cached(model, tmp_path) as url, client_of(url) as client:
        assert [draw(client, prompt) for prompt in (RED, "two dogs")] == [MISS] * 2
        lines = client.get("/metrics").text.splitlines()
    assert 'headstart_cache_faults_total{kind="lookup"} 2.0' in lines
    assert 'headstart_cache_faults_total{kind="late"} 0.0' in lines


def test_a_request_that_is_refused_does_not_pay_for_its_embedding(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.scorer.embedder import Embedder

    embed, embedded = Embedder.embed, []
    monkeypatch.setattr(Embedder, "embed", lambda self, *given: (embedded.extend(given[0]), embed(self, *given))[1])
    with serving_cached(model, tmp_path, max_waiting=2) as url, client_of(url) as client:
        for path, fields in (("/generate", {}), ("/generate", {"stream": True}), ("/v1/images/generations", {})):
            assert client.post(path, json={"prompt": "refused", "n": 3} | fields).status_code == 429
        assert 'outcome="rejected"} 3.0' in client.get("/metrics").text
        assert draw(client, RED, n=2) == MISS
    assert embedded == [RED]


def test_no_cache_at_all(model: Path, tmp_path: Path) -> None:
    with serving_cached(model, tmp_path, enabled=False) as url, client_of(url) as client:
        assert draw(client, RED, cache="use") == BYPASS
        assert client.get("/cache").json() == {"enabled": False, "tenant": "default"}
        assert client.delete("/cache").json() == {"tenant": "default", "purged": 0}
    assert not list(tmp_path.iterdir())


def test_the_method_and_the_field_are_told(client: httpx.Client, server: Running) -> None:
    assert client.post("/cache").status_code == 405
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths["/cache"]) == {"get", "delete"}
    assert "cache" in paths["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    reply = client.post("/generate", json={"prompt": "a", "cache": "no"})
    assert reply.json()["error"]["message"] == "cache: 'no' is not allowed; auto, use, bypass or refresh"


def test_pictures_of_other_settings_are_not_started_from(ada: httpx.Client) -> None:
    draw(ada, RED)
    until_kept(ada, 1)
    for change in ({"size": "72x64"}, {"guidance_scale": 9.0}, {"negative_prompt": "fox"}):
        assert draw(ada, RED, cache="use", seed=1, **change)["result"] == "miss"
    assert draw(ada, RED, sampler="euler", num_inference_steps=10)["result"] == "hit"
