"""Runs the application on a port until a signal says stop."""

from __future__ import annotations

import socket

import uvicorn

from service.api.state import Service


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service when a shutdown begins, so that running requests get a reply."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.begin_drain()
        await super().shutdown(sockets)
