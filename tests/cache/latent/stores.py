"""Entries and stores for the tests of the stores, and a TCP proxy that can fail."""

from __future__ import annotations

import os
import socket
import threading
import time

import numpy as np
import redis

from cache.latent.keys import Header, KeySpace, random_id
from cache.latent.store import Latent

REDIS_URL = os.environ.get("HEADSTART_REDIS_URL", "redis://127.0.0.1:6379")
LEVELS = (0.125, 0.2, 0.3, 0.45, 0.6)
SHAPE = (4, 64, 64)  # 32 KiB


def a_header(seed: int = 0, tenant: str = "default", levels: tuple[float, ...] = LEVELS) -> Header:
    space = KeySpace(tenant, "tiny@1", "ddpm", (("ink", 0.5),), SHAPE, 7.5, "blurry")
    embedding = np.random.default_rng(seed).standard_normal(512).astype(np.float32)
    embedding /= np.linalg.norm(embedding)
    return Header(random_id(), space, f"a red fox, {seed}", embedding, time.time(), levels, ())


def latents_of(seed: int = 0, count: int = len(LEVELS), shape: tuple[int, int, int] = SHAPE) -> list[Latent]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float16) for _ in range(count)]


class Proxy:
    """Passes bytes on to Redis; can cut all connections, stay silent, or give every request the same answer."""

    def __init__(self) -> None:
        self.silent = False
        self.answer: bytes | None = None
        target = redis.Redis.from_url(REDIS_URL).connection_pool.connection_kwargs
        self._target = (target.get("host", "127.0.0.1"), target.get("port", 6379))
        self._connections: list[socket.socket] = []
        self._port = 0
        self.start()
        self.url = f"redis://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, args=(self._listener,))
        self._accepting.start()

    def stop(self) -> None:
        """Nothing listens any more, and connections that were open are cut."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        self.cut()

    def cut(self) -> None:
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._connections += [client, server]
            threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, requests: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if self.silent:
                    continue
                if self.answer is not None:
                    if requests:
                        source.sendall(self.answer)
                    continue
                target.sendall(data)
        except OSError:
            pass
