"""A port to listen on, and uvicorn on it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from service.api.state import Service
from service.bridge import ABORT_S
from service.config import ServerSettings
from service.errors import SetupError


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

    def __init__(self, app: ASGIApp, service: Service) -> None:
        grace = int(service.settings.server.shutdown_grace_s + ABORT_S) + 5  # the service's own end comes first
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
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """While the model loads, nothing was accepted and the loading thread cannot be interrupted: end at once."""
        if self.service.loading:
            os._exit(130 if sig == signal.SIGINT else 0)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.begin_drain()
        while not self.service.drained and not self.force_exit:  # the port stays open, to say why nothing is taken
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
