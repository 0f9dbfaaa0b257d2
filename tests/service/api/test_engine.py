"""The HTTP service over the real engine and a tiny random model."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from service.config import EngineSettings, ModelSettings, Settings
from service.metrics import Metrics
from service.runtime import Runtime, open_warm_runtime
from tests import tiny
from tests.service.serving import listening

MIXED: list[dict[str, Any]] = [
    {"prompt": "a red apple", "sampler": "ddim", "num_inference_steps": 7, "seed": 1},
    {"prompt": "a blue cat", "sampler": "euler_a", "num_inference_steps": 3, "seed": 2, "guidance_scale": 1.0},
    {"prompt": "two dogs", "sampler": "dpmpp_2m", "num_inference_steps": 5, "seed": 3, "negative_prompt": "fox"},
    {"prompt": "a tiny fox", "sampler": "euler", "num_inference_steps": 4, "seed": 4, "size": "96x64"},
    {"prompt": "a green apple", "sampler": "ddim", "num_inference_steps": 6, "seed": 5, "eta": 0.5},
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tiny.sd(tmp_path_factory.mktemp("model") / "tiny")
    model = ModelSettings(model=str(folder), dtype="float32", device="cpu")

    def opener(settings: Settings, metrics: Metrics) -> Runtime:
        return open_warm_runtime(settings, metrics)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with listening(Settings(model=model, engine=EngineSettings(max_pixels=128 * 128)), opener) as (url, _):
        yield url
    torch.set_num_threads(threads)


def draw(url: str, body: dict[str, Any]) -> np.ndarray:
    reply = httpx.post(f"{url}/generate", json=body, headers={"Accept": "image/png"}, timeout=60)
    assert reply.status_code == 200, reply.text
    return np.asarray(Image.open(io.BytesIO(reply.content))).astype(int)


def test_metrics_count_what_clients_asked_for_and_nothing_else(url: str) -> None:
    """First in this file: the engine has drawn its warm-up picture and nothing more."""
    assert "headstart_steps_run_total 0.0" in httpx.get(f"{url}/metrics").text
    body = {"prompt": "a cat", "num_inference_steps": 8, "partial_images": 3, "sampler": "ddim"}
    draw(url, body)
    metrics = httpx.get(f"{url}/metrics").text
    assert "headstart_steps_run_total 8.0" in metrics
    assert 'stage="preview"' not in metrics  # nobody would have seen them


def test_pictures_drawn_at_once_are_those_drawn_alone(url: str) -> None:
    alone = [draw(url, body) for body in MIXED]
    with concurrent.futures.ThreadPoolExecutor(len(MIXED)) as pool:
        together = list(pool.map(lambda body: draw(url, body), MIXED))
    for one, other in zip(alone, together, strict=True):
        assert one.std() > 1
        assert np.abs(one - other).max() <= 2
    assert alone[3].shape == (64, 96, 3)


def test_the_reply_tells_what_the_engine_did(url: str) -> None:
    body = {"prompt": "a cat", "n": 2, "seed": 9, "num_inference_steps": 3, "sampler": "euler"}
    reply = httpx.post(f"{url}/generate", json=body, timeout=60).json()
    assert [(entry["seed"], entry["steps_run"], entry["evaluations"]) for entry in reply["data"]] == [
        (9, 3, 6),
        (10, 3, 6),
    ]
    timings = reply["timings"]
    assert 0 < timings["encode_s"] + timings["denoise_s"] + timings["decode_s"] < timings["total_s"] + 0.1
    second = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["data"][1]["b64_json"]))))
    assert np.abs(second - draw(url, body | {"n": 1, "seed": 10})).max() <= 2


def test_previews_come_before_the_picture(url: str) -> None:
    body = {"prompt": "a cat", "num_inference_steps": 8, "partial_images": 3, "stream": True, "sampler": "ddim"}
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as reply:
        names = [line.removeprefix("event: ") for line in reply.iter_lines() if line.startswith("event: ")]
    wanted = ["image_generation.partial_image"] * 3 + ["image_generation.completed", "headstart.completed"]
    assert [name for name in names if name in wanted] == wanted
    assert "headstart.progress" in names


def test_a_client_that_leaves_frees_the_engine(url: str) -> None:
    body = {"prompt": "a cat", "n": 4, "num_inference_steps": 200, "sampler": "ddim"}
    with httpx.stream("POST", f"{url}/generate", json=body | {"stream": True}, timeout=60) as reply:
        next(line for line in reply.iter_lines() if line == "event: headstart.progress")
    end = time.monotonic() + 5
    while 'outcome="cancelled"} 1.0' not in (metrics := httpx.get(f"{url}/metrics").text):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert "headstart_requests_waiting 0.0" in metrics
    assert draw(url, MIXED[1]).shape == (64, 64, 3)


def test_a_prompt_that_is_cut_off_is_told_of(url: str) -> None:
    body = {"prompt": "a cat " * 200, "negative_prompt": "fox", "num_inference_steps": 1, "sampler": "ddim"}
    reply = httpx.post(f"{url}/generate", json=body, timeout=60)
    (warning,) = reply.json()["warnings"]
    assert re.fullmatch(r"prompt: its last \d{2,} tokens were ignored; this model reads \d+ tokens", warning)
    picture = httpx.post(f"{url}/generate", json=body, headers={"Accept": "image/png"}, timeout=60)
    assert picture.headers["x-headstart-warning"] == warning
    assert httpx.post(f"{url}/generate", json=body | {"prompt": "a cat"}, timeout=60).json()["warnings"] == []


def test_a_deadline_is_kept(url: str) -> None:
    body = {"prompt": "a cat", "num_inference_steps": 200, "deadline_s": 0.05, "sampler": "ddim"}
    reply = httpx.post(f"{url}/generate", json=body, timeout=60)
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "deadline_exceeded"
    assert reply.json()["error"]["param"] == "deadline_s"


def test_limits_of_the_model_and_the_server_are_told(url: str) -> None:
    reply = httpx.post(f"{url}/generate", json={"prompt": "a", "size": "256x256"})
    assert reply.json()["error"]["message"] == "size: '256x256' is not allowed; at most 16384 pixels in all"
    samplers = httpx.get(f"{url}/v1/models").json()["data"][0]["samplers"]
    message = httpx.post(f"{url}/generate", json={"prompt": "a", "sampler": "x"}).json()["error"]["message"]
    assert all(name in message for name in samplers)
    json.dumps(samplers)
