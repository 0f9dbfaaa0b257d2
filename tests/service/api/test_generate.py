from __future__ import annotations

import base64
import concurrent.futures
import io
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from service.pictures import read_recipe
from tests.service.serving import Running

APPLE = '{"prompt": "a red apple on a blue background"}'


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_json_reply_names_every_picture_and_what_it_took(client: httpx.Client) -> None:
    body = {"prompt": "a fox", "n": 3, "seed": 70000, "num_inference_steps": 2, "size": "72x64"}
    reply = client.post("/generate", json=body)
    assert reply.status_code == 200
    answer = reply.json()
    assert set(answer) == {"id", "created", "model", "data", "timings", "warnings"}
    assert answer["model"] == "fake"
    stages = {"rewrite_s", "queue_s", "encode_s", "lookup_s", "denoise_s", "decode_s", "total_s"}
    assert set(answer["timings"]) == stages | {"patch_degree"}
    assert [entry["seed"] for entry in answer["data"]] == [70000, 70001, 70002]
    for entry in answer["data"]:
        drawn = pixels(base64.b64decode(entry.pop("b64_json")))
        assert drawn.shape == (64, 72, 3)
        assert tuple(drawn[0, 0]) == (entry["seed"] >> 16, entry["seed"] >> 8 & 255, entry["seed"] & 255)
        assert entry == {
            "seed": entry["seed"],
            "prompt": "a fox",
            "revised_prompt": "a fox",
            "steps_run": 2,
            "steps_skipped": 1,
            "evaluations": 4,
            "cache": {"result": "bypass", "similarity": None, "steps_skipped": 1, "steps_run": 2},
        }


def test_a_random_seed_is_told_and_draws_the_same_picture_again(client: httpx.Client) -> None:
    first, second = (client.post("/generate", json={"prompt": "a", "seed": -1}).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = client.post("/generate", json={"prompt": "a", "seed": first["seed"]}).json()["data"][0]
    assert again["b64_json"] == first["b64_json"]


def test_picture_reply_carries_facts_in_headers_and_settings_inside(client: httpx.Client, tmp_path: Path) -> None:
    reply = client.post("/generate", json={"prompt": "a fox", "seed": 9}, headers={"Accept": "image/png"})
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["x-headstart-seed"] == "9"
    assert reply.headers["x-headstart-steps-run"] == "4"
    assert reply.headers["x-headstart-model"] == "fake"
    assert reply.headers["x-headstart-cache"] == "bypass"
    assert "x-headstart-similarity" not in reply.headers
    (tmp_path / "fox.png").write_bytes(reply.content)
    recipe = read_recipe(tmp_path / "fox.png")
    assert recipe.prompt == "a fox"
    assert recipe.parameters["Seed"] == "9"
    assert recipe.parameters["Sampler"] == "DDIM"
    assert recipe.parameters["Cache"] == "1 of 4 steps skipped"


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_formats(client: httpx.Client, format: str) -> None:
    body = {"prompt": "a fox", "seed": 9, "output_format": format, "output_compression": 50}
    encoded = base64.b64decode(client.post("/generate", json=body).json()["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(encoded)).format == format.upper()
    reply = client.post("/generate", json={"prompt": "a"}, headers={"Accept": f"image/{format}"})
    assert reply.headers["content-type"] == f"image/{format}"
    assert Image.open(io.BytesIO(reply.content)).format == format.upper()


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("image/webp, image/png;q=0.5", "image/webp"),
        ("image/png;q=0.5, image/jpeg;q=0.9, application/json;q=0.1", "image/jpeg"),
        ("image/png;q=0, image/*", "image/jpeg"),
        ("text/html, */*;q=0.1", "application/json"),
        ("IMAGE/PNG", "image/png"),
        ("", "application/json"),
    ],
)
def test_accept_is_negotiated(client: httpx.Client, accept: str, chosen: str) -> None:
    assert client.post("/generate", json={"prompt": "a"}, headers={"Accept": accept}).headers["content-type"] == chosen


@pytest.mark.parametrize(
    ("accept", "body"),
    [
        ("text/html", {}),
        ("image/gif", {}),
        ("image/png;q=0", {}),
        ("image/png", {"output_format": "jpeg"}),
        ("image/png", {"stream": True}),
        ("text/event-stream", {}),
    ],
)
def test_accept_that_cannot_be_met(client: httpx.Client, accept: str, body: dict[str, object]) -> None:
    reply = client.post("/generate", json={"prompt": "a"} | body, headers={"Accept": accept})
    assert reply.status_code == 406
    error = reply.json()["error"]
    assert error["param"] == "Accept"
    assert accept in error["message"]


def test_one_picture_reply_cannot_hold_two(client: httpx.Client) -> None:
    reply = client.post("/generate", json={"prompt": "a", "n": 2}, headers={"Accept": "image/png"})
    assert reply.status_code == 422
    assert reply.json()["error"]["param"] == "n"


def test_what_curl_sends_with_d_and_no_content_type_of_its_own(client: httpx.Client) -> None:
    headers = {"Accept": "image/png", "User-Agent": "curl/8.5.0", "Content-Type": "application/x-www-form-urlencoded"}
    reply = client.post("/generate", content=APPLE, headers=headers)
    assert reply.headers["content-type"] == "image/png"
    assert pixels(reply.content).shape == (64, 64, 3)


@pytest.mark.parametrize(
    "content_type", [None, "application/json", "application/json; charset=UTF-8", "application/x-www-form-urlencoded"]
)
def test_json_is_read_under_the_types_that_clients_give_it(client: httpx.Client, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert client.post("/generate", content=APPLE, headers=headers).status_code == 200


def test_unicode_prompts_come_back_as_they_were(client: httpx.Client) -> None:
    prompt = 'ein "roter" Fuchs, 狐狸 🦊\nauf Grün'
    assert client.post("/generate", json={"prompt": prompt}).json()["data"][0]["prompt"] == prompt


def test_concurrent_requests_get_their_own_pictures(server: Running) -> None:
    def draw(seed: int) -> tuple[int, bytes]:
        reply = httpx.post(
            f"{server.url}/generate", json={"prompt": "a", "seed": seed}, headers={"Accept": "image/png"}
        )
        return reply.status_code, reply.content

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(draw, range(40)))
    for seed, (status, data) in enumerate(replies):
        assert status == 200
        assert tuple(pixels(data)[0, 0]) == (0, 0, seed)


def test_a_failure_is_told_and_the_next_request_is_served(client: httpx.Client) -> None:
    reply = client.post("/generate", json={"prompt": "overflow"})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "non_finite_latents"
    assert client.post("/generate", json={"prompt": "a"}).status_code == 200


def test_request_ids_are_echoed_or_made(client: httpx.Client) -> None:
    assert client.get("/health", headers={"X-Request-ID": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    made = client.get("/health", headers={"X-Request-ID": 'no "such" id'}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
