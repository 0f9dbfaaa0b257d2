"""The composition root of the HTTP service: the only place where its objects are wired."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from service.api import generate, images, ops
from service.api.middleware import ApiKey, BodyLimit, Envelope
from service.api.replies import on_headstart_error, on_http_exception
from service.api.state import Service
from service.config import Settings, version
from service.errors import HeadstartError
from service.metrics import Metrics

if TYPE_CHECKING:
    from service.runtime import Runtime

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
    for module in (generate, images, ops):
        app.include_router(module.router)
    app.add_exception_handler(HeadstartError, on_headstart_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=settings.server.max_body_bytes)
    if settings.server.api_key is not None:
        app.add_middleware(ApiKey, key=settings.server.api_key)
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
