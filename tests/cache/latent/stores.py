"""Entries for the tests of the stores."""

from __future__ import annotations

import os
import time

import numpy as np

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
