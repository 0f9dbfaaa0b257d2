"""POST /rewrite: a prompt as the image model likes it, without a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.bodies import read_body
from service.api.middleware import tenant_of
from service.api.openapi import json_body
from service.api.state import Service, refusals, service_of
from service.api.text_schemas import RewriteBody
from service.prompts import checked_text

if TYPE_CHECKING:  # importing it loads torch, and the port answers before that
    from service.llm.rewrite import Rewrite

router = APIRouter()


@router.post("/rewrite", openapi_extra=json_body(RewriteBody), summary="Rewrite a prompt for the image model")
async def rewrite(client: Request) -> Response:
    service = service_of(client)
    body = await read_body(client, RewriteBody)
    prompt = checked_text("prompt", body.prompt, 1)
    writer = service.writer
    with refusals(service.metrics.text_ended), writer.bridge.room(1):  # a full queue is told as such
        pass
    done = await rewritten(service, tenant_of(client), prompt)
    return JSONResponse(
        {
            "model": writer.card.name,
            "prompt": prompt,
            "revised_prompt": done.prompt,
            "rewrite": done.facts,
            "timings": {"rewrite_s": done.seconds},
        }
    )


async def rewritten(service: Service, tenant: str, prompt: str) -> Rewrite:
    """The prompt rewritten in the tenant's name, and counted. Raises nothing for the rewriter's sake."""
    done = await service.runtime.rewrite(prompt, tenant)
    service.metrics.rewritten(done.outcome, done.seconds)
    return done
