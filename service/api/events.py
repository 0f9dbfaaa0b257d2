"""Replies as server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import HeadstartError

log = logging.getLogger(__name__)
HEARTBEAT_S = 10.0  # silence after which proxies and clients are told that the connection lives
Messages = AsyncGenerator[tuple[str, dict[str, Any]], None]


class EventStream(Response):
    """Sends (event name, data) pairs as they come. An error after the first byte becomes an event named `error`."""

    media_type = "text/event-stream"
    heartbeat = b": still drawing\n\n"
    end = b""

    def __init__(self, messages: Messages, heartbeat_s: float = HEARTBEAT_S) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.messages = messages
        self.heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(self._with_heartbeats()) as chunks:
                async for chunk in chunks:
                    yield chunk
        except HeadstartError as error:
            yield self._chunk("error", error.body())
        except Exception:
            log.exception("a streamed reply failed")
            yield self._chunk("error", HeadstartError("internal error; the server's log says more").body())
        if self.end:
            yield self.end

    async def _with_heartbeats(self) -> AsyncGenerator[bytes, None]:
        """A comment whenever nothing came for a while. `wait` leaves the pending message alone when it times out."""
        async with contextlib.aclosing(self.messages):
            while True:
                pending = asyncio.ensure_future(anext(self.messages, None))
                try:
                    while not pending.done():
                        await asyncio.wait({pending}, timeout=self.heartbeat_s)
                        if not pending.done():
                            yield self.heartbeat
                finally:
                    if not pending.done():
                        pending.cancel()
                        await asyncio.wait({pending})
                message = pending.result()
                if message is None:
                    return
                yield self._chunk(*message)

    def _chunk(self, event: str, data: dict[str, Any]) -> bytes:
        return f"event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class DataStream(EventStream):
    """The same as OpenAI streams text: without the events' names, and with a mark at the end."""

    heartbeat = b": still writing\n\n"
    end = b"data: [DONE]\n\n"

    def _chunk(self, event: str, data: dict[str, Any]) -> bytes:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
