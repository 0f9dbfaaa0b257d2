"""Runs the application on a port until a signal says stop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from service import logs
from service.api.state import Service
from service.app import create_app
from service.bridge import ABORT_S
from service.config import ServerSettings, Settings
from service.errors import SetupError
from service.metrics import Metrics

if TYPE_CHECKING:
    from service.runtime import Runtime

log = logging.getLogger(__name__)


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

        runtime = open_warm_runtime(settings, metrics)
        logs.setup(settings.log)  # the libraries that came with it have made handlers of their own
        return runtime

    app = create_app(settings, opener, on_ready, on_failure)
    server = Server(app, settings.server)
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d, loading the model", f"[{host}]" if ":" in host else host, port)
    try:
        server.run(sockets=[listener])
    finally:
        if failures:
            raise failures[0]


def listen(settings: ServerSettings) -> socket.socket:
    """A listening socket. Raises SetupError when the address is taken, not ours, or unknown."""
    try:
        family, *_ = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except socket.gaierror as error:
        reason = error.strerror or "unknown host"
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
    except UnicodeError:
        reason = "not a host name"
    raise SetupError(f"cannot listen on {settings.host} port {settings.port}: {reason}; try another --host or --port")


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service when a shutdown begins, so that every running request gets a reply."""

    def __init__(self, app: FastAPI, settings: ServerSettings) -> None:
        grace = int(settings.shutdown_grace_s + ABORT_S) + 5  # the service's own end comes first
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=grace,
            )
        )
        self.service: Service = app.state.service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.begin_drain()
        await super().shutdown(sockets)
