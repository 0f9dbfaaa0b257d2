"""Frozen settings, one group per owner. The only reader of the environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServerSettings:
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None  # None: no key is asked for
    max_body_bytes: int = 1 << 20
    shutdown_grace_s: float = 30.0  # how long accepted requests may finish after SIGTERM


@dataclass(frozen=True, slots=True)
class ModelSettings:
    model: str = "default"  # bundle name, diffusers folder, or hub id
    revision: str | None = None
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    loras: tuple[tuple[str, str], ...] = ()  # (name, file or hub id)
    cache_dir: Path = field(default_factory=lambda: Path.home() / ".cache" / "headstart")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    max_batch: int = 8  # rows of one tick
    max_running: int = 32  # pictures that hold latent slots
    max_waiting: int = 256  # pictures accepted and not yet running; beyond it: 429
    ageing_s: float = 10.0  # waiting this long is worth one point of priority
    max_pixels: int = 1024 * 1024  # of one picture


@dataclass(frozen=True, slots=True)
class LogSettings:
    level: str = "info"  # debug | info | warning | error
    json: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    server: ServerSettings = field(default_factory=ServerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    log: LogSettings = field(default_factory=LogSettings)
