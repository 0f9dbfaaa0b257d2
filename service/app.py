"""The composition root of the HTTP service: the only place where its objects are wired."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from service import logs
from service.api import cache, chat, generate, images, jobs, ops, rewrite
from service.api.middleware import ApiKey, BodyLimit, Envelope
from service.api.replies import on_headstart_error, on_http_exception
from service.api.server import Server, listen
from service.api.state import Service
from service.config import Settings, version
from service.errors import HeadstartError
from service.metrics import Metrics

if TYPE_CHECKING:
    from service.runtime import Runtime

log = logging.getLogger(__name__)
Opener = Callable[[Settings, Metrics], "Runtime"]


def create_app(
    settings: Settings, opener: Opener, on_ready: Callable[[str], None], on_failure: Callable[[Exception], None]
) -> FastAPI:
    """The application. It answers /health at once and loads the model behind that.

    Args:
        opener: loads the model and starts its engine; called in a thread.
        on_ready: told, on the event loop, the model's name once requests are taken.
        on_failure: told, on the event loop, why that could not be done.
    """
    metrics = Metrics()
    service = Service(settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(service, opener, on_ready, on_failure))
        yield
        await loading  # a thread cannot be interrupted; a runtime that it opens must be closed
        await service.close()

    app = FastAPI(
        title="Headstart", version=version(), docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    app.state.service = service
    for module in (generate, jobs, images, chat, rewrite, cache, ops):
        app.include_router(module.router)
    app.add_exception_handler(HeadstartError, on_headstart_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=settings.server.max_body_bytes)
    if settings.server.keys:
        app.add_middleware(ApiKey, keys=settings.server.keys)
    app.add_middleware(Envelope, metrics=metrics)
    return app


async def _load(
    service: Service, opener: Opener, on_ready: Callable[[str], None], on_failure: Callable[[Exception], None]
) -> None:
    try:
        runtime = await asyncio.to_thread(opener, service.settings, service.metrics)
    except Exception as error:
        on_failure(error)
        return
    service.open(runtime)
    on_ready(runtime.card.name)


def serve(settings: Settings, begun: float) -> None:
    """Listen, load the model, and answer until SIGTERM or SIGINT.

    Args:
        begun: when the process began, by time.monotonic(); "ready" tells the seconds since then.

    Raises:
        SetupError: the address cannot be listened on.
        ModelError, HeadstartError: the model cannot be loaded, or cannot draw.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn takes over while it runs, and then raises it again
    listener = listen(settings.server)
    failures: list[Exception] = []

    def on_failure(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    def on_ready(model: str) -> None:
        log.info("ready after %.1f s, serving %s", time.monotonic() - begun, model)

    def opener(settings: Settings, metrics: Metrics) -> Runtime:
        from service.runtime import open_warm_runtime  # loads torch, in a thread, while the port answers

        runtime = open_warm_runtime(settings, metrics, cached=True, writing=True)
        logs.setup(settings.log)  # the libraries that came with it have made handlers of their own
        return runtime

    app = create_app(settings, opener, on_ready, on_failure)
    server = Server(app, app.state.service)
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d, loading the model", f"[{host}]" if ":" in host else host, port)
    try:
        server.run(sockets=[listener])
    finally:
        if failures:
            raise failures[0]
