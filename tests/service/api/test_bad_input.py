"""Whatever is wrong with a request, the reply names the field, the value and what is allowed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from service.api.schemas import GenerateBody, ImagesBody
from tests.service.serving import CARD

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "1 to 2000 characters"),
    ({"prompt": "   "}, "prompt", "1 to 2000 characters"),
    ({"prompt": "x" * 2001}, "prompt", "1 to 2000 characters"),
    ({"prompt": None}, "prompt", "text of 1 to 2000 characters"),
    ({"prompt": 3}, "prompt", "text of 1 to 2000 characters"),
    ({"prompt": "a\x00b"}, "prompt", "control characters"),
    ({"negative_prompt": "x" * 2001}, "negative_prompt", "0 to 2000 characters"),
    ({"n": 0}, "n", "1 to 8"),
    ({"n": 9}, "n", "1 to 8"),
    ({"n": "4"}, "n", "an integer, 1 to 8"),
    ({"n": 4.0}, "n", "an integer, 1 to 8"),
    ({"n": True}, "n", "an integer, 1 to 8"),
    ({"size": "64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "-64x64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "64x64\n"}, "size", "WIDTHxHEIGHT"),
    ({"size": "٦٤x٦٤"}, "size", "WIDTHxHEIGHT"),
    ({"size": "auto"}, "size", "WIDTHxHEIGHT"),
    ({"size": "64x64", "width": 72}, "size", "width 72"),
    ({"width": 65}, "width", "multiples of 8"),
    ({"width": 0}, "width", "multiples of 8"),
    ({"height": -64}, "height", "multiples of 8"),
    ({"size": "65x64"}, "size", "width: 65 is not allowed; multiples of 8"),
    ({"size": "8192x8192"}, "size", "at most 1048576 pixels"),
    ({"num_inference_steps": 0}, "num_inference_steps", "1 to 200"),
    ({"num_inference_steps": 201}, "num_inference_steps", "1 to 200"),
    ({"guidance_scale": -0.1}, "guidance_scale", "0 to 30"),
    ({"guidance_scale": 30.5}, "guidance_scale", "0 to 30"),
    ({"guidance_scale": "7"}, "guidance_scale", "a number, 0 to 30"),
    ({"guidance_scale": True}, "guidance_scale", "a number, 0 to 30"),
    ({"sampler": "nope"}, "sampler", "ddim, lcm"),
    ({"seed": -2}, "seed", "0 to 4294967295"),
    ({"seed": 2**32}, "seed", "0 to 4294967295"),
    ({"seed": 10**400}, "seed", "0 to 4294967295"),
    ({"eta": 1.5}, "eta", "0 to 1"),
    ({"eta": 0.5, "sampler": "lcm"}, "eta", "ddim"),
    ({"class_label": 1}, "class_label", "no classes"),
    ({"timesteps": [22, 0]}, "timesteps", "only a consistency model in pixel space"),
    ({"timesteps": [22, "0"]}, "timesteps.1", "a list of integers"),
    ({"lora": [{"name": "moss"}]}, "lora", "one of ink"),
    ({"lora": [{"name": "ink", "scale": 5}]}, "lora", "from -4 to 4"),
    ({"lora": [{"name": "ink", "weight": 1}]}, "lora.0.weight", "the fields are name, scale"),
    ({"lora": [{"scale": 1}]}, "lora.0.name", "a list of"),
    ({"lora": "ink"}, "lora", "a list of"),
    ({"priority": 11}, "priority", "-10 to 10"),
    ({"partial_images": 4}, "partial_images", "0 to 3"),
    ({"deadline_s": 0}, "deadline_s", "above 0"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"output_format": "gif"}, "output_format", "png, jpeg or webp"),
    ({"output_compression": 101}, "output_compression", "0 to 100"),
    ({"output_compression": -1}, "output_compression", "0 to 100"),
    ({"response_format": "url"}, "response_format", "b64_json"),
    ({"user": 7}, "user", "text"),
    ({"steps": 4}, "steps", "num_inference_steps"),
    ({"cache": "yes"}, "cache", "auto, use, bypass or refresh"),
    ({"cache": True}, "cache", "auto, use, bypass or refresh"),
    ({"enhance_prompt": "yes"}, "enhance_prompt", "true or false"),
    ({"request_id": ""}, "request_id", "text of 1 to 128"),
    ({"request_id": "a b"}, "request_id", "text of 1 to 128"),
    ({"request_id": "a\n"}, "request_id", "text of 1 to 128"),
    ({"request_id": "x" * 129}, "request_id", "text of 1 to 128"),
    ({"request_id": "a", "stream": True}, "request_id", "stream"),
    ({"patch_degree": 2}, "patch_degree", "this server draws on one GPU"),
]


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(("change", "param", "allowed"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_fields(client: httpx.Client, change: dict[str, Any], param: str, allowed: str) -> None:
    error = error_of(client.post("/generate", json={"prompt": "a fox"} | change), 422)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert allowed in error["message"]
    assert len(error["message"]) < 400


def test_every_field_has_a_wrong_value_above() -> None:
    tried = {param.split(".")[0] for _, param, _ in WRONG}
    assert set(GenerateBody.model_fields) <= tried


@pytest.mark.parametrize("field", ["n", "num_inference_steps", "guidance_scale", "partial_images", "priority"])
def test_the_schema_and_admission_tell_the_same_range(client: httpx.Client, field: str) -> None:
    out_of_range = error_of(client.post("/generate", json={"prompt": "a", field: 10**6}), 422)["message"]
    described = GenerateBody.model_fields[field].description or ""
    assert out_of_range.rpartition("; ")[2] in described


def test_all_fields_at_fault_are_named(client: httpx.Client) -> None:
    message = error_of(client.post("/generate", json={"n": "1", "size": 3}), 422)["message"]
    assert message.startswith("prompt: missing")
    assert message.endswith("(also wrong: n, size)")


def test_an_error_is_short_however_much_is_wrong(client: httpx.Client) -> None:
    error = error_of(client.post("/generate", json={"prompt": "a"} | {f"{i}" * 999: i for i in range(90)}), 422)
    assert error["param"] == "0" * 80 + "..."
    assert len(error["message"]) < 3000


def test_null_is_the_same_as_left_out(client: httpx.Client) -> None:
    body = dict.fromkeys(GenerateBody.model_fields) | {"prompt": "a"}
    assert client.post("/generate", json=body).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"{'prompt': 'a'}", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"a": NaN}', b"[" * 9999]
)
def test_malformed_bodies(client: httpx.Client, body: bytes) -> None:
    error = error_of(client.post("/generate", content=body, headers={"Content-Type": "application/json"}), 400)
    assert error["code"] == "malformed_body"
    assert len(error["message"]) < 200


@pytest.mark.parametrize("body", ["[]", "3", '"a fox"', "null", "1e999"])
def test_bodies_that_are_no_object(client: httpx.Client, body: str) -> None:
    reply = client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert "object" in error_of(reply, reply.status_code)["message"]
    assert reply.status_code == 422


def test_overflowing_numbers_are_refused(client: httpx.Client) -> None:
    reply = client.post("/generate", content='{"prompt": "a", "guidance_scale": 1e999}')
    assert "guidance_scale" in error_of(reply, 422)["message"]


@pytest.mark.parametrize(
    "content_type", ["text/plain", "multipart/form-data; boundary=x", "application/json; charset=latin-1", "nonsense"]
)
def test_other_content_types(client: httpx.Client, content_type: str) -> None:
    reply = client.post("/generate", content='{"prompt": "a"}', headers={"Content-Type": content_type})
    assert error_of(reply, 415)["param"] == "Content-Type"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"quality": "hd"}, "quality"),
        ({"style": "natural"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"moderation": "low"}, "moderation"),
        ({"size": "big"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"n": 10}, "n"),
        ({"cache": "off"}, "cache"),
        ({"priority": 1}, "priority"),
    ],
)
def test_openai_fields_that_would_change_something(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    error = error_of(client.post("/v1/images/generations", json={"prompt": "a"} | change), 422)
    assert error["param"] == param


def test_null_openai_fields(client: httpx.Client) -> None:
    names = {field.alias or name for name, field in ImagesBody.model_fields.items()}
    body = json.dumps(dict.fromkeys(names) | {"prompt": "a", "model": CARD.name})
    assert client.post("/v1/images/generations", content=body).status_code == 200
