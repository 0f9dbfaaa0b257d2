"""The latent cache as requests and tenants see it: what a cache mode asks for, in whose namespace, and what is kept."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from service.config import SHARED_TENANT
from service.diffusion.request import CacheIntent

if TYPE_CHECKING:  # importing it loads faiss
    from cache.latent.lookup import LatentCache

log = logging.getLogger(__name__)

CLOSE_S = 10.0  # for what still waits to be written
QUIET_S = 60.0  # between two lines on the same trouble


class Latents:
    """One model's cache.

    Args:
        embed: the embedding of a prompt, [D] float32 of unit norm, for a namespace; called in a thread of its own.
        shared: all tenants have one namespace.
    """

    def __init__(self, cache: LatentCache, embed: Callable[[str, str], np.ndarray], *, shared: bool) -> None:
        self.cache = cache
        self._embed = embed
        self._shared = shared
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._said = -QUIET_S

    async def intent(self, prompt: str, mode: str, seeded: bool, namespace: str) -> CacheIntent | None:
        """What the cache may do for a request; None: nothing.

        Args:
            mode: "use" and "refresh" are orders; "bypass" forbids; "auto" is "use", but "bypass" for a request that
                names a seed, which promises the same picture again.
            seeded: the request names a seed.
        """
        if mode == "bypass" or (mode == "auto" and seeded):
            return None
        try:
            embedding = await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, prompt, namespace)
        except Exception:  # the picture can be drawn all the same
            self._complain()
            return None
        return CacheIntent(embedding=embedding, look=mode != "refresh", store=True)

    def stats(self, tenant: str) -> dict[str, Any]:
        """What a tenant has here and what that has saved since the start, fit for JSON."""
        stats = self.cache.stats(self.namespace(tenant))
        counts = stats.counts
        lookups = {result: counts[result] for result in ("hit", "miss", "skipped", "error")}
        pictures = sum(lookups.values())
        return {
            "entries": stats.entries,
            "bytes": stats.bytes,
            "lookups": lookups,
            "hit_rate": _share(counts["hit"], pictures),
            "hit_rate_by_k": {str(k): _share(hits, pictures) for k, hits in stats.hits_by_steps.items()},
            "steps_saved": counts["rows_skipped"],
            "stored": counts["stored"],
            "dropped": counts["dropped"],
            "evicted": counts["evicted"],
            "expired": counts["expired"],
            "policy": self.cache.policy.source,
        }

    def purge(self, tenant: str, prompt: str | None) -> int:
        """Forget a tenant's entries, of one prompt or all; how many."""
        return self.cache.purge(self.namespace(tenant), None if prompt is None else prompt.strip())

    def close(self) -> None:
        """Write what waits, for CLOSE_S seconds at most."""
        self._thread.shutdown()
        if not self.cache.close(CLOSE_S):
            log.warning("the cache was closed before all of it was written")

    def namespace(self, tenant: str) -> str:
        """Where a tenant's latents are, and what is remembered of its prompts."""
        return SHARED_TENANT if self._shared else tenant

    def _complain(self) -> None:
        if time.monotonic() - self._said >= QUIET_S:
            self._said = time.monotonic()
            log.exception("a prompt could not be embedded; its pictures are drawn from scratch")


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0
