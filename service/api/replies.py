"""Errors as replies."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from service.errors import BusyError, HeadstartError, MethodError, NotFoundError


def error_reply(error: HeadstartError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """`{"error": {message, type, param, code}}` with the error's status, and Retry-After where it has one."""
    extra = dict(headers or {})
    if isinstance(error, BusyError):
        extra["Retry-After"] = str(error.retry_after)
    return JSONResponse(error.body(), error.status, extra)


async def on_headstart_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HeadstartError)
    return error_reply(error)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """What the router raises: 404 for an unknown path, 405 for a method that the path does not have."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return error_reply(MethodError(f"{where}: the path answers {allowed}"), error.headers)
    if error.status_code == 404:
        return error_reply(NotFoundError(f"{where}: no such path; /openapi.json lists them"))
    raise error
