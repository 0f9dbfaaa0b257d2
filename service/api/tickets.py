"""Jobs that POST /generate makes: asked for with `Prefer: respond-async`, or named by a `request_id`.

A job is drawn by a task of its own, so that any number of connections can wait for its end, or none.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from service.api.drawing import Drawing, Picture, accept, draw
from service.api.live import disconnected
from service.api.middleware import tenant_of
from service.api.replies import error_reply
from service.api.schemas import GenerateBody
from service.api.state import Service
from service.diffusion.request import State
from service.errors import CancelledError, HeadstartError
from service.jobs.ticket import Ticket

log = logging.getLogger(__name__)


def prefers_async(client: Request) -> bool:
    """Whether `Prefer` asks for a job (RFC 7240, section 4.1). Preferences that are not known are ignored."""
    preferences = ",".join(client.headers.getlist("prefer")).lower().split(",")
    return any(preference.partition(";")[0].strip() == "respond-async" for preference in preferences)


def ticket_of(service: Service, client: Request, body: GenerateBody, format: str) -> Ticket[Drawing]:
    """The job that has the body's request_id already, else a new one. Raises ConflictError for another body's."""
    tenant, fields = tenant_of(client), _digests(body, format)
    if body.request_id is not None:
        ticket = service.jobs.named(tenant, body.request_id, fields)
        if ticket is not None:
            return ticket
    ticket = service.jobs.open(tenant, body.request_id, fields)
    service.keep(_carry_out(service, ticket, body, format))
    return ticket


async def promised(service: Service, ticket: Ticket[Drawing]) -> JSONResponse:
    """202 as soon as the job has been accepted, or why it was not."""
    ticket.detached = True
    await ticket.accepted.wait()
    if ticket.refused:
        return error_reply(error_of(ticket))
    headers = {"Location": f"/jobs/{ticket.id}", "Preference-Applied": "respond-async", "Cache-Control": "no-store"}
    return JSONResponse(job_facts(service, ticket), 202, headers)


async def awaited(service: Service, client: Request, ticket: Ticket[Drawing]) -> None:
    """Waits for the job's end. Raises CancelledError when the client closes its connection before.

    The last connection to close that waits for a job which nobody wants otherwise cancels it; its request_id is free
    then.
    """
    ticket.replies += 1
    ended, left = asyncio.create_task(ticket.ended.wait()), asyncio.create_task(disconnected(client))
    try:
        await asyncio.wait({ended, left}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()
        left.cancel()
        ticket.replies -= 1
        if not ticket.ended.is_set() and not ticket.replies and not ticket.detached:
            service.jobs.unname(ticket)
            ticket.cancel()
    if not ticket.ended.is_set():
        raise CancelledError("the client closed the connection")


def job_facts(service: Service, ticket: Ticket[Drawing]) -> dict[str, Any]:
    """What is told of a job, but for its result."""
    facts: dict[str, Any] = {
        "id": ticket.id,
        "request_id": ticket.name,
        "state": ticket.state,
        "created": int(ticket.created),
    }
    if ticket.state is State.QUEUED:
        facts["position"] = service.position(ticket.id)
    elif ticket.state is State.IN_PROGRESS:
        facts |= {"steps_done": ticket.steps_done, "steps": ticket.steps}
    elif ticket.state is State.FAILED:
        facts |= error_of(ticket).body()
    return facts


def error_of(ticket: Ticket[Drawing]) -> HeadstartError:
    """Why a job has ended without a result. To be told, not raised: it would keep the frames that it passed through."""
    assert ticket.error is not None
    return ticket.error


async def _carry_out(service: Service, ticket: Ticket[Drawing], body: GenerateBody, format: str) -> None:
    try:
        job, stream = await accept(service, ticket.tenant, body, format, ticket.id)
    except Exception as error:
        service.jobs.refuse(ticket, _told(ticket, error))
        return
    ticket.accept(job.request.n, job.request.steps, stream.cancel)
    try:
        drawing = await draw(service, None, job, stream, ticket.note)
    except CancelledError as error:
        service.jobs.end(ticket, State.CANCELLED, error=_told(ticket, error))
    except Exception as error:
        service.jobs.end(ticket, State.FAILED, error=_told(ticket, error))
    else:
        size = sum(len(picture.data) for picture in drawing.pictures)
        service.jobs.end(ticket, State.COMPLETED, result=_without_pixels(drawing), size=size)


def _without_pixels(drawing: Drawing) -> Drawing:
    """What a reply is made of; the pictures are there as files."""
    pictures = [Picture(replace(picture.image, pixels=None), picture.data) for picture in drawing.pictures]
    job = replace(drawing.job, request=replace(drawing.job.request, cache=None))
    return replace(drawing, job=job, pictures=pictures)


def _told(ticket: Ticket[Drawing], error: Exception) -> HeadstartError:
    """What clients are told; kept without the frames that raised it."""
    if isinstance(error, HeadstartError):
        error.__context__ = None
        return error.with_traceback(None)
    log.error("job %s failed", ticket.id, exc_info=error)
    return HeadstartError("internal error; the server's log says more")


def _digests(body: GenerateBody, format: str) -> dict[str, str]:
    """What was asked for, by field; null is the same as left out. The last one is the Accept header's."""
    asked = body.model_dump(exclude={"request_id"}, exclude_none=True) | {"Accept header": format}
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in asked.items()}
