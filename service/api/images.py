"""POST /v1/images/generations: the OpenAI shape, for clients that exist."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.bodies import read_body
from service.api.drawing import Job, accept, cache_facts, draw, events_of
from service.api.events import EventStream, Messages
from service.api.messages import base64_text, image_message, partial_message
from service.api.middleware import tenant_of
from service.api.openapi import json_body
from service.api.schemas import ImagesBody
from service.api.state import Service, service_of
from service.bridge import RequestStream
from service.diffusion.request import Image, Partial
from service.errors import NotFoundError

router = APIRouter()


@router.post("/v1/images/generations", openapi_extra=json_body(ImagesBody), summary="Draw pictures, as OpenAI does")
async def generations(client: Request) -> Response:
    service = service_of(client)
    body = await read_body(client, ImagesBody)
    model = service.runtime.card.name
    if body.model not in (None, model):
        raise NotFoundError(f"model: {body.model!r} is not served; {model} is", param="model", code="model_not_found")
    job, stream = await accept(service, tenant_of(client), body, body.output_format or "png")
    if body.stream:
        return EventStream(_messages(service, client, job, stream))
    drawing = await draw(service, client, job, stream)
    reply: dict[str, Any] = {
        "created": drawing.created,
        "data": [{"b64_json": base64_text(picture.data)} | _facts(job, picture.image) for picture in drawing.pictures],
        "size": job.size,
        "output_format": job.format,
        "background": "opaque",
        "warnings": drawing.completed.warnings,
    }
    return JSONResponse(reply)


def _facts(job: Job, image: Image) -> dict[str, Any]:
    return {"seed": image.seed, "cache": cache_facts(image)} | job.prompt_facts()


async def _messages(service: Service, client: Request, job: Job, stream: RequestStream) -> Messages:
    async with events_of(service, client, stream) as events:
        async for event in events:
            if isinstance(event, Partial):
                message = partial_message(job, event, await job.preview(service, event))
            elif isinstance(event, Image):
                message = image_message(job, (await job.picture(service, event)).data) | _facts(job, event)
            else:
                continue
            yield message["type"], message | {"index": event.index}
