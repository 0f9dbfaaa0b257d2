"""POST /generate: JSON in; JSON, the picture itself, or server-sent events out."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.accept import negotiate
from service.api.bodies import read_body
from service.api.drawing import Drawing, Job, Picture, accept, cache_facts, draw, events_of
from service.api.events import EventStream, Messages
from service.api.messages import base64_text, image_message, partial_message
from service.api.middleware import tenant_of
from service.api.openapi import json_body
from service.api.replies import error_reply
from service.api.schemas import GenerateBody
from service.api.state import Service, service_of
from service.api.tickets import awaited, error_of, prefers_async, promised, ticket_of
from service.bridge import RequestStream
from service.diffusion.request import Completed, Image, Partial, Progress
from service.errors import invalid
from service.events import Started

router = APIRouter()
PICTURES = ("png", "jpeg", "webp")


PREFER = {
    "name": "Prefer",
    "in": "header",
    "description": "respond-async: answer 202 and a job at once; not with stream",
    "schema": {"type": "string"},
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {"description": "a job, at the path that Location names"},
    409: {"description": "the request_id was sent before with something else"},
}


@router.post(
    "/generate",
    openapi_extra=json_body(GenerateBody) | {"parameters": [PREFER]},
    responses=RESPONSES,
    summary="Draw pictures",
)
async def generate(client: Request) -> Response:
    service = service_of(client)
    body = await read_body(client, GenerateBody)
    media_type = _media_type(client, body)
    format = media_type.partition("/")[2] if media_type.startswith("image/") else body.output_format or "png"
    if media_type.startswith("image/") and (body.n or 1) > 1:
        raise invalid("n", body.n, f"1 for Accept: {media_type}; ask for application/json to get several pictures")
    if body.stream and body.request_id is not None:
        raise invalid("request_id", body.request_id, "left out of a request with stream: a stream is sent once")
    if not body.stream and prefers_async(client):
        return await promised(service, ticket_of(service, client, body, format))
    if body.request_id is not None:
        ticket = ticket_of(service, client, body, format)
        await awaited(service, client, ticket)
        return error_reply(error_of(ticket)) if ticket.result is None else _reply(ticket.result, media_type)
    job, stream = await accept(service, tenant_of(client), body, format)
    if body.stream:
        return EventStream(_messages(service, client, job, stream))
    return _reply(await draw(service, client, job, stream), media_type)


def reply_body(drawing: Drawing) -> dict[str, Any]:
    """The JSON of a request that is done."""
    job, completed = drawing.job, drawing.completed
    return {
        "id": job.request.id,
        "created": drawing.created,
        "model": job.model,
        "data": [{"b64_json": base64_text(picture.data)} | _facts(job, picture.image) for picture in drawing.pictures],
        "timings": job.timings(completed),
        "warnings": completed.warnings,
    }


def _reply(drawing: Drawing, media_type: str) -> Response:
    if not media_type.startswith("image/"):
        return JSONResponse(reply_body(drawing))
    picture = drawing.pictures[0]
    return Response(picture.data, media_type=media_type, headers=_headers(drawing.job, picture, drawing.completed))


def _media_type(client: Request, body: GenerateBody) -> str:
    accept = ",".join(client.headers.getlist("accept"))
    if body.stream:  # JSON is what clients that do not set Accept by hand send for every request
        return negotiate(accept, ["text/event-stream", "application/json"])
    formats = PICTURES if body.output_format is None else (body.output_format,)
    return negotiate(accept, ["application/json", *(f"image/{format}" for format in formats)])


def _facts(job: Job, image: Image) -> dict[str, Any]:
    return {
        "seed": image.seed,
        "prompt": job.prompt,
        **job.prompt_facts(),
        "steps_run": image.steps_run,
        "steps_skipped": image.steps_skipped,
        "evaluations": image.evaluations,
        "cache": cache_facts(image),
    }


def _headers(job: Job, picture: Picture, completed: Completed) -> dict[str, str]:
    facts = {
        "Id": job.request.id,
        "Model": quote(job.model),
        "Seed": picture.image.seed,
        "Steps-Run": picture.image.steps_run,
        "Steps-Skipped": picture.image.steps_skipped,
        "Evaluations": picture.image.evaluations,
        "Cache": picture.image.cache_result,
        "Total-Seconds": f"{job.timings(completed)['total_s']:.3f}",
    }
    if picture.image.similarity is not None:
        facts["Similarity"] = cache_facts(picture.image)["similarity"]
    if job.rewrite is not None:
        facts |= {"Revised-Prompt": quote(job.request.prompt), "Rewrite": job.rewrite.outcome}
    if completed.warnings:
        facts["Warning"] = "; ".join(completed.warnings)
    return {f"X-Headstart-{name}": str(value) for name, value in facts.items()}


async def _messages(service: Service, client: Request, job: Job, stream: RequestStream) -> Messages:
    yield "headstart.accepted", {"type": "headstart.accepted", "id": job.request.id, "model": job.model}
    async with events_of(service, client, stream) as events:
        async for event in events:
            match event:
                case Started():
                    yield "headstart.started", {"type": "headstart.started"}
                case Progress(_, index, step, steps):
                    name = "headstart.progress"
                    yield name, {"type": name, "index": index, "step": step, "steps": steps}
                case Partial():
                    data = await job.preview(service, event)
                    yield "image_generation.partial_image", partial_message(job, event, data) | {"index": event.index}
                case Image():
                    picture = await job.picture(service, event)
                    message = image_message(job, picture.data) | {"index": event.index} | _facts(job, event)
                    yield "image_generation.completed", message
                case Completed():
                    name = "headstart.completed"
                    facts = {"timings": job.timings(event), "warnings": event.warnings}
                    yield name, {"type": name, "id": job.request.id} | facts
