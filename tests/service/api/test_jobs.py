"""Jobs: 202 and what follows, and requests that are sent again under the same id."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from service.bridge import Bridge
from service.config import EngineSettings, JobSettings, ModelSettings, ServerSettings, Settings
from service.events import Cancelled
from service.metrics import Metrics
from service.pictures import encode
from service.runtime import Runtime, open_warm_runtime
from tests import tiny
from tests.service.serving import CARD, FakeEngine, Running, listening, serving, until

ASYNC = {"Prefer": "respond-async"}
LONG = {"prompt": "a", "num_inference_steps": 200}
ENDED = ("completed", "failed", "cancelled")


def post(running: Running | str, body: dict[str, Any], **headers: str) -> httpx.Response:
    url = running if isinstance(running, str) else running.url
    return httpx.post(f"{url}/generate", json=body, headers=headers, timeout=60)


def submit(running: Running | str, body: dict[str, Any]) -> str:
    """A job's URL."""
    reply = post(running, body, **ASYNC)
    assert reply.status_code == 202, reply.text
    return (running if isinstance(running, str) else running.url) + reply.headers["location"]


def ended(job: str) -> dict[str, Any]:
    until(lambda: httpx.get(job).json()["state"] in ENDED, 30)
    facts: dict[str, Any] = httpx.get(job).json()
    return facts


@pytest.fixture
def slow() -> Iterator[Running]:
    with serving(step_s=0.05, shutdown_grace_s=0.0) as running:
        yield running


@contextlib.contextmanager
def hanging_up(running: Running, body: dict[str, Any]) -> Iterator[None]:
    """A synchronous request whose client closes its connection at the end of the context."""
    data = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(head.encode() + data)
        yield


def test_a_job_ends_with_the_synchronous_reply(server: Running) -> None:
    body = {"prompt": "a fox", "n": 2, "seed": 9, "output_format": "webp"}
    reply = post(server, body, **ASYNC)
    assert reply.status_code == 202
    assert reply.headers["preference-applied"] == "respond-async"
    accepted = reply.json()
    assert reply.headers["location"] == f"/jobs/{accepted['id']}"
    assert {"id", "request_id", "state", "created"} <= set(accepted)
    facts = ended(server.url + reply.headers["location"])
    assert set(facts) == {"id", "request_id", "state", "created", "result"}
    assert (facts["state"], facts["id"], facts["request_id"]) == ("completed", accepted["id"], None)
    synchronous = post(server, body).json()
    assert set(facts["result"]) == set(synchronous)
    assert facts["result"]["id"] == accepted["id"]
    for field in ("model", "data", "timings", "warnings"):
        assert facts["result"][field] == synchronous[field]


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("RESPOND-ASYNC", 202),
        ("wait=10, respond-async;x=1", 202),
        ("respond-asynchronously", 200),
        ("handling=lenient", 200),
    ],
)
def test_preferences(server: Running, value: str, status: int) -> None:
    assert post(server, {"prompt": "a"}, Prefer=value).status_code == status


def test_a_stream_is_not_made_a_job(server: Running) -> None:
    reply = post(server, {"prompt": "a", "stream": True}, **ASYNC)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "preference-applied" not in reply.headers


def test_a_failed_job_tells_the_reason(server: Running) -> None:
    facts = ended(submit(server, {"prompt": "overflow"}))
    assert facts["state"] == "failed"
    assert facts["error"] == post(server, {"prompt": "overflow"}).json()["error"]


def test_what_is_refused_makes_no_job(server: Running) -> None:
    reply = post(server, {"prompt": "a", "n": 9, "request_id": "refused"}, **ASYNC)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "n")
    assert post(server, {"prompt": "a", "request_id": "refused"}, **ASYNC).status_code == 202


def test_progress_and_cancel_within_a_step(slow: Running) -> None:
    job = submit(slow, LONG | {"n": 2})
    until(lambda: httpx.get(job).json().get("steps_done", 0) >= 4)
    facts = httpx.get(job).json()
    assert (facts["state"], facts["steps"]) == ("in_progress", 400)
    asked = time.monotonic()
    reply = httpx.delete(job)
    assert time.monotonic() - asked < 3 * slow.engine.step_s
    assert (reply.status_code, reply.json()["state"]) == (200, "cancelled")
    assert isinstance(slow.engine.ended[0], Cancelled)
    assert httpx.delete(job).json() == reply.json() == httpx.get(job).json()
    metrics = httpx.get(f"{slow.url}/metrics").text
    assert 'headstart_jobs{state="cancelled"} 1.0' in metrics
    assert 'headstart_jobs{state="in_progress"} 0.0' in metrics
    assert 'headstart_requests_total{outcome="cancelled"} 1.0' in metrics


def test_a_cancel_does_not_wait_for_ever_for_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.jobs.CANCEL_WAIT_S", 0.01)
    with serving(step_s=0.3, shutdown_grace_s=0.0) as running:
        job = submit(running, LONG)
        until(lambda: bool(running.engine.rows))
        reply = httpx.delete(job)
        assert reply.status_code == 202
        assert reply.json()["state"] in ("queued", "in_progress")
        assert ended(job)["state"] == "cancelled"


def test_a_completed_job_stays_so_when_it_is_deleted(server: Running) -> None:
    job = submit(server, {"prompt": "a"})
    facts = ended(job)
    assert httpx.delete(job).json()["state"] == "completed"
    assert httpx.get(job).json() == facts


@pytest.mark.parametrize("id", ["nope", "0" * 32, "%F0%9F", "x" * 999])
def test_unknown_jobs(server: Running, id: str) -> None:
    for reply in (httpx.get(f"{server.url}/jobs/{id}"), httpx.delete(f"{server.url}/jobs/{id}")):
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "job_not_found")
        assert len(reply.text) < 300


class OneByOne(FakeEngine):
    """Draws one request at a time, in order."""

    def step(self) -> list[Any]:
        waiting = dict(list(self.requests.items())[1:])
        for id in waiting:
            del self.requests[id]
        events = super().step()
        self.requests |= waiting
        return events


@contextlib.contextmanager
def one_by_one(settings: Settings, step_s: float) -> Iterator[str]:
    def opener(given: Settings, metrics: Metrics) -> Runtime:
        bridge = Bridge(OneByOne(step_s), given.engine)
        bridge.start()
        return Runtime(CARD, bridge, given.engine)

    with listening(settings, opener) as (url, _):
        yield url


def test_a_full_queue_refuses_jobs_too_and_tells_positions() -> None:
    settings = Settings(engine=EngineSettings(max_waiting=2), server=ServerSettings(shutdown_grace_s=0.0))
    with one_by_one(settings, 0.02) as url:
        first = submit(url, LONG | {"request_id": "first"})
        until(lambda: httpx.get(first).json()["state"] == "in_progress")
        waiting = [submit(url, LONG | {"seed": 1}), submit(url, LONG | {"seed": 2})]
        assert [httpx.get(job).json() | {"created": 0, "id": ""} for job in waiting] == [
            {"id": "", "request_id": None, "state": "queued", "created": 0, "position": position} for position in (1, 2)
        ]
        refused = post(url, LONG | {"request_id": "late"}, **ASYNC)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert post(url, LONG | {"request_id": "late"}).status_code == 429
        assert post(url, LONG | {"request_id": "first"}, **ASYNC).status_code == 202  # it has its place already
        assert 'headstart_jobs{state="queued"} 2.0' in httpx.get(f"{url}/metrics").text
        assert httpx.delete(waiting[0]).json()["state"] == "cancelled"
        assert httpx.get(waiting[1]).json()["position"] == 1
        httpx.delete(first)
        until(lambda: httpx.get(waiting[1]).json()["state"] == "in_progress")


def test_results_go_after_their_time() -> None:
    settings = Settings(jobs=JobSettings(ttl_s=1.0))
    with one_by_one(settings, 0.001) as url:
        job = submit(url, {"prompt": "a", "request_id": "once"})
        first = ended(job)
        assert first["state"] == "completed"
        until(lambda: httpx.get(job).status_code == 410)
        for reply in (httpx.get(job), httpx.delete(job)):
            assert (reply.status_code, reply.json()["error"]["code"]) == (410, "job_gone")
            assert "kept for 1 s" in reply.json()["error"]["message"]
        assert 'headstart_jobs{state="completed"} 0.0' in httpx.get(f"{url}/metrics").text
        again = submit(url, {"prompt": "b", "request_id": "once"})  # its id is free
        assert again != job


def test_tenants_do_not_see_each_others_jobs_and_ids() -> None:
    keys = {"X-API-Key": "of-ann"}, {"X-API-Key": "of-bob"}
    with serving(api_keys=(("ann", "of-ann"), ("bob", "of-bob"))) as running:
        bodies = {"prompt": "ann's", "request_id": "same"}, {"prompt": "bob's", "request_id": "same"}
        replies = [post(running, body, **key, **ASYNC) for body, key in zip(bodies, keys, strict=True)]
        assert [reply.status_code for reply in replies] == [202, 202]
        job = running.url + replies[0].headers["location"]
        assert httpx.get(job, headers=keys[0]).status_code == 200
        for reply in (httpx.get(job, headers=keys[1]), httpx.delete(job, headers=keys[1])):
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "job_not_found")
        assert httpx.get(job).status_code == 401


def test_one_id_is_drawn_once_however_it_is_sent(slow: Running) -> None:
    body = {"prompt": "a", "num_inference_steps": 10, "request_id": "order-1"}  # a random seed
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(post, slow, body) for _ in range(4)]
        asked += [pool.submit(post, slow, body, Accept="image/png")]
        job = pool.submit(submit, slow, body).result()
        assert httpx.get(job).json()["state"] in ("queued", "in_progress")
        *texts, picture = [each.result() for each in asked]
    assert len(slow.engine.ended) == 1
    assert len({text.text for text in texts}) == 1
    reply = texts[0].json()
    assert httpx.get(job).json()["result"] == reply
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == base64.b64decode(reply["data"][0]["b64_json"])
    assert picture.headers["x-headstart-id"] == reply["id"]
    later = post(slow, body | {"size": None})
    assert later.text == texts[0].text
    assert len(slow.engine.ended) == 1


def test_a_failure_is_told_again_under_its_id(server: Running) -> None:
    body = {"prompt": "overflow", "request_id": "fails"}
    first, again = post(server, body), post(server, body)
    assert first.status_code == again.status_code == 500
    assert first.json() == again.json()
    job = submit(server, body)
    assert httpx.get(job).json()["error"] == first.json()["error"]
    kept = server.service.jobs.get("default", job.rpartition("/")[2]).error
    assert kept is not None
    assert kept.__traceback__ is None  # nor anything of the requests that it was told to


def test_all_that_wait_for_a_request_are_told_that_it_was_refused() -> None:
    body = {"prompt": "a", "request_id": "refused"}
    with serving(max_waiting=0) as running, concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(post, running, body, **headers) for headers in [ASYNC, {}] * 4]
        replies = [each.result() for each in waiting]
        assert [reply.status_code for reply in replies] == [429] * 8
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies)
        assert sum(running.service.jobs.counts().values()) == 0


@pytest.mark.parametrize(
    ("change", "headers", "field"),
    [
        ({"prompt": "b"}, {}, "prompt"),
        ({"seed": 1}, {}, "seed"),
        ({"size": "72x64"}, {}, "size"),
        ({"lora": [{"name": "ink", "scale": 0.5}]}, {}, "lora"),
        ({"output_format": "jpeg"}, {}, "output_format"),
        ({}, {"Accept": "image/webp"}, "Accept header"),
        ({"prompt": "b"}, ASYNC, "prompt"),
    ],
)
def test_another_body_under_an_id(server: Running, change: dict[str, Any], headers: dict[str, str], field: str) -> None:
    body = {"prompt": "a", "lora": [{"name": "ink"}], "request_id": "taken"}
    assert post(server, body).status_code == 200
    reply = post(server, body | change, **headers)
    assert reply.status_code == 409
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == ("request_id", "request_id_reused")
    assert f"another {field};" in error["message"]


def test_a_client_that_hangs_up_ends_its_request_and_can_send_it_again(slow: Running) -> None:
    body = LONG | {"request_id": "left"}
    with hanging_up(slow, body):
        until(lambda: 2 in slow.engine.rows.values())
    left = time.monotonic()
    until(lambda: bool(slow.engine.ended))
    assert time.monotonic() - left < 3 * slow.engine.step_s
    again = httpx.get(submit(slow, body)).json()
    assert again["state"] in ("queued", "in_progress")


def test_a_request_that_another_waits_for_goes_on(slow: Running) -> None:
    body = {"prompt": "a", "num_inference_steps": 12, "request_id": "shared"}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with hanging_up(slow, body):
            until(lambda: 2 in slow.engine.rows.values())
            other = pool.submit(post, slow, body)
            until(lambda: 5 in slow.engine.rows.values())
        assert other.result().status_code == 200
    with hanging_up(slow, body | {"request_id": "job"}):
        until(lambda: bool(slow.engine.rows))
        job = submit(slow, body | {"request_id": "job"})
    assert ended(job)["state"] == "completed"
    assert not [event for event in slow.engine.ended if isinstance(event, Cancelled)]


def test_waiting_for_a_job_that_is_cancelled(slow: Running) -> None:
    body = LONG | {"request_id": "waited"}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = submit(slow, body)
        waiting = pool.submit(post, slow, body)
        until(lambda: httpx.get(job).json()["state"] == "in_progress")
        httpx.delete(job)
        reply = waiting.result()
    assert (reply.status_code, reply.json()["error"]["code"]) == (499, "cancelled")


def test_shutdown_lets_jobs_finish_within_its_grace() -> None:
    with serving(step_s=0.02, shutdown_grace_s=20.0) as running:
        submit(running, {"prompt": "a", "num_inference_steps": 20, "request_id": "last"})
        until(lambda: bool(running.engine.rows))
        running.server.should_exit = True
        until(lambda: running.service.draining)
        assert post(running, {"prompt": "new"}, **ASYNC).status_code == 503
        assert post(running, {"prompt": "a", "num_inference_steps": 20, "request_id": "last"}).status_code == 200
    assert running.service.jobs.counts()["completed"] == 1


def test_shutdown_waits_for_pictures_that_are_being_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*arguments: Any) -> bytes:
        time.sleep(0.5)
        return encode(*arguments)

    monkeypatch.setattr("service.pictures.encode", slowly)
    with serving() as running:
        submit(running, {"prompt": "a"})
        until(lambda: bool(running.engine.ended))
        running.server.should_exit = True
    assert running.service.jobs.counts()["completed"] == 1


def test_shutdown_ends_every_job() -> None:
    with serving(step_s=0.05, shutdown_grace_s=0.1) as running:
        for _ in range(5):
            submit(running, LONG)
        running.server.should_exit = True
    counts = running.service.jobs.counts()
    assert (counts["failed"], sum(counts.values())) == (5, 5)


def test_a_dead_engine_ends_every_job(caplog: pytest.LogCaptureFixture) -> None:
    with serving(step_s=0.02) as running:
        job = submit(running, LONG)
        until(lambda: bool(running.engine.rows))
        submit(running, {"prompt": "crash"})
        facts = ended(job)
    assert (facts["state"], facts["error"]["code"]) == ("failed", "engine_dead")


def test_openapi_describes_jobs(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"get", "delete"} <= set(paths["/jobs/{job_id}"])
    assert {"404", "410"} <= set(paths["/jobs/{job_id}"]["get"]["responses"])
    generate = paths["/generate"]["post"]
    assert [parameter["name"] for parameter in generate["parameters"]] == ["Prefer"]
    assert {"202", "409"} <= set(generate["responses"])
    assert "request_id" in str(generate["requestBody"])


def test_jobs_on_the_real_engine_start_in_the_order_that_their_positions_tell(tmp_path: Path) -> None:
    model = ModelSettings(model=str(tiny.sd(tmp_path / "tiny")), dtype="float32", device="cpu")
    settings = Settings(model=model, engine=EngineSettings(max_running=1), server=ServerSettings(shutdown_grace_s=0.0))

    def opener(given: Settings, metrics: Metrics) -> Runtime:
        return open_warm_runtime(given, metrics)

    with listening(settings, opener) as (url, _):
        first = submit(url, {"prompt": "a cat", "sampler": "ddim", "num_inference_steps": 200})
        until(lambda: httpx.get(first).json()["state"] == "in_progress")
        facts = httpx.get(first).json()
        assert 0 <= facts["steps_done"] < facts["steps"] == 200
        body = {"prompt": "a dog", "num_inference_steps": 2, "seed": 3}
        jobs = {priority: submit(url, body | {"priority": priority}) for priority in (0, 5, -5)}
        assert [httpx.get(jobs[priority]).json().get("position") for priority in (5, 0, -5)] == [1, 2, 3]
        assert httpx.delete(first).json()["state"] == "cancelled"
        results = {priority: ended(job)["result"] for priority, job in jobs.items()}
        queued = [results[priority]["timings"]["queue_s"] for priority in (5, 0, -5)]
        assert queued[0] < queued[2]
        data = post(url, body).json()["data"]
    assert all(result["data"] == data for result in results.values())
    picture = base64.b64decode(data[0]["b64_json"])
    assert Image.open(io.BytesIO(picture)).size == (64, 64)
    assert re.fullmatch("[0-9a-f]{32}", results[0]["id"])
