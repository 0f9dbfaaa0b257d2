"""Health, metrics, limits, keys, the queue, and the end of a server."""

from __future__ import annotations

import concurrent.futures
import logging
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.service.serving import CARD, Running, serving, until

LONG = {"prompt": "a", "num_inference_steps": 20}


def post(running: Running, body: dict[str, object]) -> httpx.Response:
    return httpx.post(f"{running.url}/generate", json=body, timeout=30)


def test_health_answers_while_the_model_loads() -> None:
    loading = threading.Event()
    with serving(loading=loading) as running:
        assert httpx.get(f"{running.url}/health").json() == {"status": "alive"}
        for path in ("/health/ready", "/v1/models"):
            reply = httpx.get(running.url + path)
            assert reply.status_code == 503
            assert reply.json()["error"]["message"] == "the model is loading"
        assert post(running, LONG).status_code == 503
        loading.set()
        while httpx.get(f"{running.url}/health/ready").status_code == 503:
            time.sleep(0.01)
        assert httpx.get(f"{running.url}/health/ready").json() == {
            "status": "ready",
            "model": "fake",
            "language_model": None,
        }
        assert httpx.head(f"{running.url}/health/ready").status_code == 200


def test_a_dead_engine_is_not_ready(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as running:
        reply = post(running, {"prompt": "crash"})
        assert reply.status_code == 503
        assert "RuntimeError" in reply.json()["error"]["message"]
        ready = httpx.get(f"{running.url}/health/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "engine_dead")
        assert post(running, LONG).status_code == 503
        assert httpx.get(f"{running.url}/health").status_code == 200


@pytest.mark.parametrize("path", ["/", "/nope", "/generate/", "/v1", "/docs"])
def test_unknown_paths(client: httpx.Client, path: str) -> None:
    error = client.get(path).json()["error"]
    assert error["code"] == "not_found"
    assert path in error["message"]


def test_wrong_methods(client: httpx.Client) -> None:
    reply = client.get("/generate")
    assert reply.status_code == 405
    assert reply.headers["allow"] == "POST"
    assert reply.json()["error"]["code"] == "method_not_allowed"
    assert client.delete("/health").status_code == 405


def test_openapi_describes_the_bodies(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    body = paths["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["prompt"]
    assert "$ref" not in str(body)
    assert "quality" in str(paths["/v1/images/generations"]["post"]["requestBody"])


def test_models_tell_what_can_be_asked_for(client: httpx.Client) -> None:
    model = client.get("/v1/models/fake").json()
    assert model["default_size"] == "64x64"
    assert model["samplers"]["lcm"]["steps"] == CARD.samplers["lcm"].steps
    assert model["loras"] == ["ink"]


def test_metrics_tell_what_runs_and_what_waits() -> None:
    with serving(step_s=0.02) as running, concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(post, running, LONG | {"n": 3})
        wanted = {"headstart_requests_running 2.0", "headstart_requests_waiting 0.0"}
        until(lambda: wanted <= set(httpx.get(f"{running.url}/metrics").text.splitlines()))
        wanted = {"headstart_requests_running 0.0", 'headstart_requests_total{outcome="completed"} 2.0'}
        until(lambda: wanted <= set(httpx.get(f"{running.url}/metrics").text.splitlines()))


def test_metrics_count_and_never_name_a_prompt() -> None:
    with serving() as running:
        post(running, {"prompt": "a very private fox", "n": 2})
        post(running, {"prompt": "overflow"})
        httpx.get(f"{running.url}/private/path")
        reply = httpx.get(f"{running.url}/metrics")
        running.service.metrics.tick(3, 6, 0.2)
        running.service.metrics.stage("decode", 0.1)
        later = httpx.get(f"{running.url}/metrics").text
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = reply.text.splitlines()
    assert 'headstart_requests_total{outcome="completed"} 1.0' in lines
    assert 'headstart_requests_total{outcome="failed"} 1.0' in lines
    assert "headstart_steps_skipped_total 2.0" in lines
    assert "headstart_e2e_request_latency_seconds_count 2.0" in lines
    assert "headstart_queue_time_seconds_count 2.0" in lines
    assert 'headstart_http_requests_total{route="/generate",status="200"} 1.0' in lines
    assert 'headstart_http_requests_total{route="unmatched",status="404"} 1.0' in lines
    assert "private" not in reply.text
    for line in (
        'headstart_step_batch_size_bucket{le="3.0"} 1.0',
        "headstart_steps_run_total 3.0",
        "headstart_evaluations_total 6.0",
        'headstart_stage_latency_seconds_sum{stage="decode"} 0.1',
    ):
        assert line in later.splitlines()


def test_the_log_names_requests_and_never_prompts(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client.post("/generate", json={"prompt": "a very private fox"}, headers={"X-Request-ID": "seen"})
    client.get("/a%0Ab?secret=1")
    client.get("/health")
    lines = [record for record in caplog.records if record.name == "service.access"]
    assert [record.levelno for record in lines] == [logging.INFO, logging.INFO, logging.DEBUG]
    assert lines[0].getMessage().startswith("POST /generate 200 ")
    assert lines[0].getMessage().endswith(" 127.0.0.1 seen")
    assert lines[1].getMessage().startswith("GET /a%0Ab 404 ")
    assert not [record for record in caplog.records if "private" in record.getMessage()]


def test_an_unforeseen_error_is_a_500_in_the_error_shape(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, server: Running
) -> None:
    monkeypatch.setattr(server.service.metrics, "exposition", lambda: {}["a secret"])
    reply = client.get("/metrics")
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert "secret" not in reply.text
    assert "a secret" in caplog.text
    assert reply.headers["x-request-id"] in caplog.text


def test_announced_body_over_the_limit(client: httpx.Client) -> None:
    reply = client.post("/generate", content=b" " * (1 << 20) + b"{}")
    assert reply.status_code == 413
    assert "1048576 bytes" in reply.json()["error"]["message"]


def test_body_at_the_limit_is_read(client: httpx.Client) -> None:
    body = b'{"prompt": "a"}'
    assert client.post("/generate", content=b" " * ((1 << 20) - len(body)) + body).status_code == 200


def test_chunked_body_is_refused_before_all_of_it_is_read(server: Running) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head)
        for _ in range(17):  # 1 MiB and 64 KiB of a body that never ends
            connection.sendall(chunk)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(api_key="open-sesame") as running:
        yield running


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer open-sesam\xe9".encode("latin-1")}, 401),
        ({"Authorization": "Basic open-sesame"}, 401),
        ({"X-API-Key": "open-sesam"}, 401),
        ({"Authorization": "Bearer open-sesame"}, 200),
        ({"authorization": "bearer open-sesame"}, 200),
        ({"X-API-Key": "open-sesame"}, 200),
    ],
)
def test_api_key(locked: Running, headers: dict[str, str], status: int) -> None:
    reply = httpx.get(f"{locked.url}/v1/models", headers=headers)
    assert reply.status_code == status
    if status == 401:
        assert reply.json()["error"]["type"] == "authentication_error"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "x-request-id" in reply.headers


def test_health_needs_no_key_and_everything_else_does(locked: Running) -> None:
    assert httpx.get(f"{locked.url}/health").status_code == 200
    assert httpx.get(f"{locked.url}/health/ready").status_code == 200
    assert httpx.get(f"{locked.url}/metrics").status_code == 401
    assert httpx.get(f"{locked.url}/nope").status_code == 401
    assert httpx.post(f"{locked.url}/generate", content=b" " * (2 << 20)).status_code == 401


def test_a_full_queue_says_when_to_come_again() -> None:
    with serving(step_s=0.2, max_waiting=2) as running, concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: post(running, {"prompt": "a", "num_inference_steps": 2}), range(8)))
        metrics = httpx.get(f"{running.url}/metrics").text
    refused = [reply for reply in replies if reply.status_code == 429]
    assert {reply.status_code for reply in replies} == {200, 429}
    assert f'headstart_requests_total{{outcome="rejected"}} {len(refused)}.0' in metrics
    for reply in refused:
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["type"] == "rate_limit_error"


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "engine"}


def running_post(running: Running, replies: list[httpx.Response]) -> threading.Thread:
    thread = threading.Thread(target=lambda: replies.append(post(running, LONG)))
    thread.start()
    while not running.engine.rows:
        time.sleep(0.005)
    return thread


def test_shutdown_lets_running_requests_finish_and_takes_no_more() -> None:
    replies: list[httpx.Response] = []
    with serving(step_s=0.03, shutdown_grace_s=20.0) as running:
        thread = running_post(running, replies)
        running.server.should_exit = True
        while not running.service.draining:
            time.sleep(0.005)
        refused = post(running, LONG)
        ready = httpx.get(f"{running.url}/health/ready")
        thread.join()
    for reply in (refused, ready):
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "shutting_down"
    assert replies[0].status_code == 200


def test_shutdown_answers_what_its_grace_does_not_suffice_for() -> None:
    replies: list[httpx.Response] = []
    with serving(step_s=0.2, shutdown_grace_s=0.1) as running:
        thread = running_post(running, replies)
        begun = time.monotonic()
        running.server.should_exit = True
        thread.join()
    assert time.monotonic() - begun < 3
    assert replies[0].status_code == 503
    assert replies[0].json()["error"]["code"] == "shutting_down"


def test_shutdown_while_the_model_loads() -> None:
    before = engine_threads()
    loading = threading.Event()
    with serving(loading=loading) as running:
        running.server.should_exit = True
        while not running.service.draining:
            time.sleep(0.005)
        loading.set()
    assert engine_threads() == before
