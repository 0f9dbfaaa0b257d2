"""Few-step students over HTTP: what the server says of them, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from models.diffusion.loading import load_model
from service.bridge import Bridge
from service.config import Settings
from service.diffusion.engine import DiffusionEngine
from service.metrics import Metrics
from service.runtime import Runtime
from tests import tiny
from tests.service.serving import listening, settings


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tiny.bundle_with_loras(tmp_path_factory.mktemp("bundle") / "model")

    def opener(given: Settings, metrics: Metrics) -> Runtime:
        model = load_model(str(folder), dtype="float32", device="cpu", cache_dir=folder)
        bridge = Bridge(DiffusionEngine(model, given.engine), given.engine)
        bridge.start()
        return Runtime(model.card, bridge, given.engine)

    with listening(settings(), opener) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_the_model_lists_its_students(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["samplers"]["consistency"]["fixed_guidance"] is True
    assert model["samplers"]["consistency"]["max_steps"] == 50
    assert model["loras"] == ["lcm-lora", "tuned"]
    assert model["student_loras"]["lcm-lora"]["sampler"] == "lcm"
    assert model["student_loras"]["lcm-lora"]["defaults"]["guidance_scale"] == 2.5


@pytest.mark.parametrize("change", [{"sampler": "consistency"}, {"lora": [{"name": "lcm-lora"}]}])
def test_a_student_draws_with_one_evaluation_a_step(client: httpx.Client, change: dict[str, Any]) -> None:
    body = {"prompt": "a cat", "seed": 1, "num_inference_steps": 2, "response_format": "b64_json"} | change
    reply = client.post("/generate", json=body, headers={"Accept": "application/json"})
    assert reply.status_code == 200
    (image,) = reply.json()["data"]
    assert image["evaluations"] == 2


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        (
            {"sampler": "consistency", "guidance_scale": 7.5},
            "guidance_scale",
            "guidance_scale: 7.5 is not allowed; 3 or nothing",
        ),
        (
            {"sampler": "consistency", "num_inference_steps": 51},
            "num_inference_steps",
            "num_inference_steps: 51 is not allowed; 1 to 50 with the sampler consistency",
        ),
        (
            {"sampler": "ddim", "lora": [{"name": "lcm-lora"}]},
            "lora",
            "lora: 'lcm-lora' is not allowed; it was made for the sampler lcm, not for ddim",
        ),
        (
            {"lora": [{"name": "lcm-lora"}, {"name": "tuned"}]},
            "lora",
            "lora: ['lcm-lora', 'tuned'] is not allowed; at most one of them",
        ),
    ],
)
def test_what_a_student_cannot_do_is_refused(
    client: httpx.Client, change: dict[str, Any], param: str, message: str
) -> None:
    reply = client.post("/generate", json={"prompt": "a cat"} | change)
    assert reply.status_code == 422
    assert reply.json()["error"]["param"] == param
    assert reply.json()["error"]["message"].startswith(message)
