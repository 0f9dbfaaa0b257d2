"""Server-sent events, heartbeats, and clients that leave."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from service.api.events import EventStream, Messages
from service.events import Cancelled
from tests.service.serving import Running, serving, until

SLOW = {"prompt": "a", "num_inference_steps": 200}


@pytest.fixture
def slow() -> Iterator[Running]:
    with serving(step_s=0.05, shutdown_grace_s=0.0) as running:
        yield running


def events(client: httpx.Client, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    with client.stream("POST", "/generate", json=body | {"stream": True}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        text = "".join(reply.iter_text())
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_a_stream_tells_progress_previews_pictures_and_timings(client: httpx.Client) -> None:
    received = events(client, {"prompt": "a", "n": 2, "partial_images": 1, "seed": 3, "output_format": "webp"})
    names = [name for name, _ in received]
    assert all(name == data.get("type") for name, data in received)
    assert names[:2] == ["headstart.accepted", "headstart.started"]
    assert names.count("image_generation.partial_image") == 2
    assert names[-1] == "headstart.completed"
    assert received[-1][1]["id"] == received[0][1]["id"]
    assert received[-1][1]["timings"]["total_s"] == 1.0
    done = [data for name, data in received if name == "image_generation.completed"]
    assert [(data["index"], data["seed"], data["size"]) for data in done] == [(0, 3, "64x64"), (1, 4, "64x64")]
    for data in done:
        assert Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).format == "WEBP"
    assert all(data["steps"] == 4 for name, data in received if name == "headstart.progress")


def test_a_failure_midway_ends_the_stream_with_an_error(client: httpx.Client) -> None:
    name, data = events(client, {"prompt": "overflow"})[-1]
    assert name == "error"
    assert set(data["error"]) == {"message", "type", "param", "code"}
    assert data["error"]["code"] == "non_finite_latents"


def test_bad_input_is_told_by_status_before_a_stream_begins(client: httpx.Client) -> None:
    assert client.post("/generate", json={"prompt": "", "stream": True}).status_code == 422


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_request_within_a_step(slow: Running, stream: bool) -> None:
    body = json.dumps(SLOW | {"stream": stream}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", slow.port)) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: 2 in slow.engine.rows.values())
    left = time.monotonic()
    until(lambda: bool(slow.engine.ended))
    assert time.monotonic() - left < 3 * slow.engine.step_s
    assert isinstance(slow.engine.ended[0], Cancelled)
    until(lambda: 'headstart_requests_total{outcome="cancelled"} 1.0' in httpx.get(f"{slow.url}/metrics").text)


def test_one_client_leaving_does_not_disturb_another(slow: Running) -> None:
    body = {"prompt": "a", "num_inference_steps": 10, "seed": 1}
    with (
        httpx.Client(base_url=slow.url) as other,
        httpx.stream("POST", f"{slow.url}/generate", json=SLOW | {"stream": True}),
    ):
        until(lambda: bool(slow.engine.rows))
        first = other.post("/generate", json=body)
    until(lambda: not slow.engine.rows)
    assert first.status_code == 200
    assert httpx.post(f"{slow.url}/generate", json=body).json()["data"] == first.json()["data"]


def chunks(messages: Messages, heartbeat_s: float) -> list[bytes]:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        raise AssertionError

    asyncio.run(EventStream(messages, heartbeat_s)({"type": "http"}, receive, send))
    return sent


def test_silence_is_filled_with_comments() -> None:
    async def messages() -> Messages:
        await asyncio.sleep(0.1)
        yield "late", {"n": 1}

    sent = chunks(messages(), 0.03)
    assert sent.count(b": still drawing\n\n") in (2, 3)
    assert sent[-2] == b'event: late\ndata: {"n": 1}\n\n'


def test_an_unforeseen_error_is_told_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    async def messages() -> Messages:
        yield "first", {}
        raise RuntimeError("a secret")

    sent = b"".join(chunks(messages(), 1.0))
    assert b"event: error" in sent
    assert b"secret" not in sent
    assert "a secret" in caplog.text
