"""Pixel-space consistency models over HTTP: the pictures of the stock pipeline, given the same noise."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from accel.samplers.noise import INITIAL_ROW, gaussian
from models.diffusion.loading import load_model
from service import logs
from service.bridge import Bridge
from service.cli import main
from service.config import Settings
from service.diffusion.engine import DiffusionEngine
from service.metrics import Metrics
from service.pictures import read_recipe
from service.runtime import Runtime
from tests import tiny
from tests.models.diffusion.test_equivalence import stock
from tests.service.serving import listening, settings

SEED, SHAPE = 5, (3, 16, 16)


@pytest.fixture(scope="module", params=[None, 10], ids=["unconditional", "classes"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.consistency(tmp_path_factory.mktemp("model") / "cm", num_classes=request.param)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    def opener(given: Settings, metrics: Metrics) -> Runtime:
        model = load_model(str(folder), dtype="float32", device="cpu", cache_dir=folder)
        bridge = Bridge(DiffusionEngine(model, given.engine), given.engine)
        bridge.start()
        return Runtime(model.card, bridge, given.engine)

    with listening(settings(), opener) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        yield client


def classes(client: httpx.Client) -> dict[str, int]:
    """What a request must say besides, for this model."""
    return {} if client.get("/v1/models").json()["data"][0]["num_classes"] is None else {"class_label": 7}


def noise(row: int) -> torch.Tensor:
    return gaussian(torch.tensor([SEED]), row, SHAPE, torch.device("cpu"))


def expected(folder: Path, monkeypatch: pytest.MonkeyPatch, label: int | None, **steps: Any) -> np.ndarray:
    """The stock pipeline's picture, its noise replaced by that of the service."""
    rows = iter(range(100))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_consistency_models.randn_tensor", lambda *_, **__: noise(next(rows))
    )
    pipeline = stock(folder, "ConsistencyModelPipeline")
    return np.asarray(pipeline(latents=noise(INITIAL_ROW), class_labels=label, output_type="np", **steps).images[0])


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({"num_inference_steps": 1}, {"num_inference_steps": 1}),
        ({"num_inference_steps": 3}, {"num_inference_steps": 3}),
        ({"timesteps": [22, 0]}, {"num_inference_steps": None, "timesteps": [22, 0]}),
        ({"timesteps": [39, 22, 0]}, {"num_inference_steps": None, "timesteps": [39, 22, 0]}),
    ],
)
def test_pictures_are_those_of_the_stock_pipeline(
    client: httpx.Client, folder: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], steps: dict[str, Any]
) -> None:
    more = classes(client)
    reply = client.post("/generate", json={"prompt": "", "seed": SEED} | more | asked)
    assert reply.status_code == 200, reply.text
    (data,) = reply.json()["data"]
    picture = np.asarray(PillowImage.open(io.BytesIO(base64.b64decode(data["b64_json"]))), np.float64)
    theirs = expected(folder, monkeypatch, more.get("class_label"), **steps)
    assert np.abs(picture - theirs * 255).max() <= 1
    assert data["steps_run"] == asked.get("num_inference_steps", len(asked.get("timesteps", [])))
    assert theirs.std() > 0.05


def test_the_class_and_the_timesteps_matter(client: httpx.Client) -> None:
    """So that the test above cannot pass by ignoring them."""
    more = classes(client)
    changes: list[dict[str, Any]] = [{"timesteps": [22, 0]}, {"timesteps": [30, 0]}]
    changes += [{"timesteps": [22, 0], "class_label": 2}] if more else []
    bodies = [{"prompt": "", "seed": SEED} | more | change for change in changes]
    pictures = {client.post("/generate", json=body).json()["data"][0]["b64_json"] for body in bodies}
    assert len(pictures) == len(bodies)


def test_what_is_missing_or_wrong_is_named(client: httpx.Client) -> None:
    more = classes(client)
    changes = [({"timesteps": [0, 22]}, "timesteps", "strictly decreasing, the last of them 0")]
    changes += [({"timesteps": "22"}, "timesteps", "a list of integers")]
    changes += [({"class_label": None}, "class_label", "one of 0 to 9")] if more else []
    for change, param, told in changes:
        reply = client.post("/generate", json={"prompt": ""} | more | change)
        assert reply.status_code == 422
        assert reply.json()["error"]["param"] == param
        assert told in reply.json()["error"]["message"]


def test_the_shell_takes_timesteps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "setup", lambda settings: None)
    path = tmp_path / "x.png"
    classes = json.loads((folder / "unet" / "config.json").read_text())["num_class_embeds"]
    label = [] if classes is None else ["--class-label", "7"]
    command = ["generate", "", "--model", str(folder), "--device", "cpu", "--seed", "1", "-o", str(path), *label]
    assert main([*command, "--timesteps", "22,0", "--quiet"]) == 0
    assert read_recipe(path).parameters["Timesteps"] == "22, 0"
    assert main([*command, "--timesteps", "0,22", "--quiet"]) == 2
    assert "--timesteps: [0, 22] is not allowed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--timesteps", "few"])
    assert "integers with commas between them" in capsys.readouterr().err
