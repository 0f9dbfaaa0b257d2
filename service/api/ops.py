"""What operators and their tools ask: is it alive, is it ready, what does it serve, what has it done."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.state import Service, service_of
from service.errors import NotFoundError
from service.metrics import CONTENT_TYPE

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="The process answers")
async def health() -> Response:
    return JSONResponse({"status": "alive"})


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", summary="Requests are taken; 503 says why not")
async def ready(client: Request) -> Response:
    return JSONResponse({"status": "ready", "model": service_of(client).runtime.card.name})


@router.get("/v1/models", summary="What is served")
async def models(client: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(service_of(client))]})


@router.get("/v1/models/{model_id:path}", summary="One of them")
async def model(client: Request, model_id: str) -> Response:
    entry = _model(service_of(client))
    if model_id != entry["id"]:
        message = f"model: {model_id!r} is not served; {entry['id']} is"
        raise NotFoundError(message, param="model", code="model_not_found")
    return JSONResponse(entry)


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(client: Request) -> Response:
    return Response(service_of(client).metrics.exposition(), media_type=CONTENT_TYPE)


def _model(service: Service) -> dict[str, Any]:
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
