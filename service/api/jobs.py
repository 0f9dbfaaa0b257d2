"""GET and DELETE /jobs/{id}: what became of a request that answered 202, or that had a request_id."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.generate import reply_body
from service.api.middleware import tenant_of
from service.api.state import service_of
from service.api.tickets import job_facts

router = APIRouter()
CANCEL_WAIT_S = 5.0  # for the step that is being run; a cancel takes effect before the next one
HEADERS = {"Cache-Control": "no-store"}
RESPONSES: dict[int | str, dict[str, Any]] = {
    404: {"description": "no job of this tenant has the id"},
    410: {"description": "its result was kept for as long as it could be"},
}


@router.get("/jobs/{job_id}", summary="One job: its state and, once it is completed, its result", responses=RESPONSES)
async def job(client: Request, job_id: str) -> Response:
    service = service_of(client)
    ticket = service.jobs.get(tenant_of(client), job_id)
    result = {} if ticket.result is None else {"result": reply_body(ticket.result)}
    return JSONResponse(job_facts(service, ticket) | result, headers=HEADERS)


@router.delete(
    "/jobs/{job_id}",
    summary="Cancel a job; one that has ended stays as it is",
    responses=RESPONSES | {202: {"description": "a step takes long; the job ends after it"}},
)
async def cancel(client: Request, job_id: str) -> Response:
    service = service_of(client)
    ticket = service.jobs.get(tenant_of(client), job_id)
    ticket.cancel()
    ended = asyncio.create_task(ticket.ended.wait())
    await asyncio.wait({ended}, timeout=CANCEL_WAIT_S)
    ended.cancel()
    return JSONResponse(job_facts(service, ticket), 200 if ticket.ended.is_set() else 202, HEADERS)
