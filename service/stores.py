"""Where a model's latents are kept: a folder of its own, or its part of a Redis server."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from service.config import Settings
from service.errors import SetupError

if TYPE_CHECKING:
    from cache.latent.store import Store


def identity(name: str, revision: str, folder: Path) -> str:
    """The model that latents belong to, fit for a file's name: "name@revision".

    A local folder has no revision and may hold another model tomorrow: the sizes and times of its weights and settings
    stand in.
    """
    if revision == "local":
        files = sorted([*folder.glob("*/*.safetensors"), *folder.glob("*/*config.json"), *folder.glob("*.json")])
        facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        revision = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    return re.sub(r"[^\w.@-]", "_", f"{name}@{revision}")


def folder_of(settings: Settings) -> Path:
    """The folder of folders, one for each model."""
    return settings.cache.folder or settings.model.cache_dir / "latents"


def snapshots_of(settings: Settings, model: str) -> Path | None:
    """The folder of what one model's indexes save, beside its latents; None: a Redis server has no folder."""
    return None if settings.cache.redis_url is not None else folder_of(settings) / model / "index"


def open_store(settings: Settings, model: str) -> Store:
    """The store of one model's latents. It is opened by its first call, which raises StoreError if that fails.

    Args:
        model: an `identity`.

    Raises:
        SetupError: the URL of the Redis server is none.
    """
    chosen = settings.cache
    if chosen.redis_url is None:
        from cache.latent.store_lmdb import LmdbStore

        return LmdbStore(folder_of(settings) / model, chosen.budget_bytes)
    from cache.latent.store_redis import RedisStore

    try:
        return RedisStore(chosen.redis_url, model, ttl_s=dict(chosen.ttl_s))
    except ValueError as error:
        raise SetupError(f"cache.redis_url: {error}", param="cache.redis_url") from None
