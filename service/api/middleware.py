"""What happens around every route: request id, key, size limit, access log, metrics, and the last word on errors."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Mapping
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.replies import error_reply
from service.config import DEFAULT_TENANT
from service.errors import AuthenticationError, HeadstartError, TooLargeError
from service.metrics import Metrics

access = logging.getLogger("service.access")
log = logging.getLogger(__name__)
PROBES = ("/health", "/health/ready", "/metrics")  # asked every few seconds, for ever
OPEN_PATHS = ("/health", "/health/ready")  # orchestrators ask these without a key
TENANT = "headstart.tenant"  # in a request's scope


class Envelope:
    """Outermost: gives the request its id, writes the access log line, counts, and turns any exception into a reply."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:/+=-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        begun = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499
        except Exception:
            log.exception("request %s failed", request_id)
            if status == 0:
                reply = error_reply(HeadstartError("internal error; the server's log says more"))
                await reply(scope, receive, send_with_id)
        finally:
            self._record(scope, request_id, status or 499, time.monotonic() - begun)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self.metrics.http_requests.labels(route=route, status=str(status)).inc()
        client = scope["client"][0] if scope.get("client") else "-"
        method, path = scope["method"], quote(scope["path"])[:200]
        level = logging.DEBUG if route in PROBES and status == 200 else logging.INFO
        access.log(level, "%s %s %d %.3fs %s %s", method, path, status, seconds, client, request_id)


class ApiKey:
    """Asks for a key in `Authorization: Bearer` or `X-API-Key`, before the body is read; the key tells the tenant."""

    def __init__(self, app: ASGIApp, keys: Mapping[str, str]) -> None:
        self.app = app
        self.digests = {tenant: _digest(key.encode()) for tenant, key in keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            tenant = self._tenant(Headers(scope=scope))
            if tenant is None:
                error = AuthenticationError("a valid API key is needed, as Authorization: Bearer KEY or X-API-Key: KEY")
                reply = error_reply(error, {"WWW-Authenticate": "Bearer"})
                return await reply(scope, receive, send)
            scope[TENANT] = tenant
        await self.app(scope, receive, send)

    def _tenant(self, headers: Headers) -> str | None:
        """Compares with every key, digests of one length, so that the time tells nothing of any."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given.encode("latin-1"))
        found = [tenant for tenant, known in self.digests.items() if hmac.compare_digest(digest, known)]
        return found[0] if found else None


def tenant_of(request: Request) -> str:
    """Whose request it is: by its key, or the one tenant there is where no key is asked for."""
    tenant: str = request.scope.get(TENANT, DEFAULT_TENANT)
    return tenant


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyLimit:
    """Refuses a body over the limit: at once when its length is announced, else when the limit is passed."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.limit:
            return await error_reply(self._error())(scope, receive, send)
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self._error()
            return message

        await self.app(scope, limited, send)

    def _error(self) -> TooLargeError:
        return TooLargeError(f"body: over the limit of {self.limit} bytes", param="body")
