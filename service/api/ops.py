"""What operators and their tools ask: is it alive, is it ready, what does it serve, what has it done."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.state import Service, service_of
from service.errors import NotFoundError
from service.metrics import CONTENT_TYPE

if TYPE_CHECKING:  # importing it loads torch, and the port answers before that
    from service.writer import Writer

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="The process answers")
async def health() -> Response:
    return JSONResponse({"status": "alive"})


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", summary="Requests are taken; 503 says why not")
async def ready(client: Request) -> Response:
    runtime = service_of(client).runtime
    writer = runtime.writer
    language = None if writer is None else writer.card.name if writer.bridge.ready else "stopped"
    return JSONResponse({"status": "ready", "model": runtime.card.name, "language_model": language})


@router.get("/v1/models", summary="What is served")
async def models(client: Request) -> Response:
    return JSONResponse({"object": "list", "data": _models(service_of(client))})


@router.get("/v1/models/{model_id:path}", summary="One of them")
async def model(client: Request, model_id: str) -> Response:
    entries = {entry["id"]: entry for entry in _models(service_of(client))}
    if model_id not in entries:
        message = f"model: {model_id!r} is not served; {' and '.join(entries)} {'is' if len(entries) == 1 else 'are'}"
        raise NotFoundError(message, param="model", code="model_not_found")
    return JSONResponse(entries[model_id])


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(client: Request) -> Response:
    return Response(service_of(client).metrics.exposition(), media_type=CONTENT_TYPE)


def _models(service: Service) -> list[dict[str, Any]]:
    writer = service.runtime.writer
    return [_image_model(service)] + ([] if writer is None else [_language_model(service, writer)])


def _language_model(service: Service, writer: Writer) -> dict[str, Any]:
    card = writer.card
    return {
        "id": card.name,
        "object": "model",
        "created": int(service.ready_at),
        "owned_by": "headstart",
        "kind": "language",
        "revision": card.revision,
        "max_model_len": writer.longest,
        "chat": card.has_chat,
    }


def _image_model(service: Service) -> dict[str, Any]:
    card = service.runtime.card
    return {
        "id": card.name,
        "object": "model",
        "created": int(service.ready_at),
        "owned_by": "headstart",
        "kind": card.kind,
        "revision": card.revision,
        "default_size": "x".join(map(str, card.default_size)),
        "size_multiple": card.size_multiple,
        "default_sampler": card.default_sampler,
        "samplers": {name: dataclasses.asdict(defaults) for name, defaults in card.samplers.items()},
        "num_classes": card.num_classes,
        "loras": list(card.loras),
        "student_loras": {name: dataclasses.asdict(student) for name, student in card.student_loras.items()},
    }
