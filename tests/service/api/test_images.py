"""A stock OpenAI client."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import openai
import pytest
from PIL import Image

from tests.service.serving import Running


@pytest.fixture
def stock(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def picture(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_generate(stock: openai.OpenAI) -> None:
    reply = stock.images.generate(
        prompt="a red fox", model="fake", n=2, size="256x256", quality="auto", background="opaque", user="someone"
    )
    assert reply.data is not None
    assert [picture(entry.b64_json).size for entry in reply.data] == [(256, 256)] * 2
    assert reply.size == "256x256"
    assert reply.created > 1_700_000_000


def test_headstart_fields_go_in_the_extra_body(stock: openai.OpenAI) -> None:
    extra = {"seed": 5, "num_inference_steps": 3, "guidance_scale": 1.5, "negative_prompt": "b", "sampler": "lcm"}
    reply = stock.images.generate(
        prompt="a", size="auto", output_format="jpeg", output_compression=80, extra_body=extra
    )
    assert reply.data is not None
    drawn = picture(reply.data[0].b64_json)
    assert drawn.format == "JPEG"
    assert drawn.size == (64, 64)
    text = drawn.getexif().get_ifd(0x8769)[0x9286].removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert text.startswith("a\nNegative prompt: b\nSteps: 3, Sampler: LCM, CFG scale: 1.5, Seed: 5,")


def test_streaming(stock: openai.OpenAI) -> None:
    with stock.images.generate(prompt="a", stream=True, partial_images=2) as events:
        received = list(events)
    assert [event.type for event in received] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in received[:2]] == [0, 1]  # type: ignore[union-attr]
    assert all(picture(event.b64_json).size == (64, 64) for event in received)
    assert received[-1].size == "64x64"


def test_a_failure_in_a_stream_raises(stock: openai.OpenAI) -> None:
    with stock.images.generate(prompt="overflow", stream=True) as events, pytest.raises(openai.APIError) as caught:
        list(events)
    assert caught.value.code == "non_finite_latents"


def test_errors_have_the_shape_that_the_client_reads(stock: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        stock.images.generate(prompt="a", size="65x64")  # type: ignore[call-overload]
    assert caught.value.param == "size"
    assert caught.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError) as unknown:
        stock.images.generate(prompt="a", model="dall-e-3")
    assert unknown.value.code == "model_not_found"
    assert "fake" in unknown.value.message


def test_models(stock: openai.OpenAI) -> None:
    assert [model.id for model in stock.models.list()] == ["fake"]
    assert stock.models.retrieve("fake").owned_by == "headstart"
    with pytest.raises(openai.NotFoundError):
        stock.models.retrieve("owner/name")
