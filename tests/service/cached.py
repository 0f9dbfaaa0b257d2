"""A tiny bundle whose prompts can be compared, served with its latents in a folder of the test's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

from service.config import CacheSettings, EngineSettings, ModelSettings, ServerSettings, Settings
from service.runtime import open_warm_runtime
from tests import tiny
from tests.service.serving import listening

STEPS = {"sampler": "ddim", "num_inference_steps": 10}
KEYS = (("ada", "key-of-ada"), ("bob", "key-of-bob"))


def bundle(folder: Path) -> Path:
    """`tiny.bundle` with the text side of a scorer."""
    tiny.bundle(folder)
    (folder / "scorer").mkdir()
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    save_file({"projection.weight": weight}, folder / "scorer" / "model.safetensors")
    return folder


@contextlib.contextmanager
def serving_cached(
    model: Path, folder: Path, *, tenants: bool = False, max_waiting: int = 64, **cache: Any
) -> Iterator[str]:
    """The URL of a server on the model, with its cache in the folder; ready."""
    settings = Settings(
        server=ServerSettings(api_keys=KEYS if tenants else ()),
        model=ModelSettings(model=str(model), dtype="float32", device="cpu", cache_dir=folder),
        engine=EngineSettings(max_pixels=128 * 128, max_waiting=max_waiting),
        cache=CacheSettings(folder=folder, **cache),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with listening(settings, lambda given, metrics: open_warm_runtime(given, metrics, cached=True)) as (url, _):
            yield url
    finally:
        torch.set_num_threads(threads)


def client_of(url: str, tenant: str | None = None) -> httpx.Client:
    headers = {} if tenant is None else {"Authorization": f"Bearer {dict(KEYS)[tenant]}"}
    return httpx.Client(base_url=url, headers=headers, timeout=60)


def draw(client: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    """What the reply says of the cache's part in its first picture."""
    reply = client.post("/generate", json=STEPS | {"prompt": prompt} | fields)
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()["data"][0]["cache"]
    return told


def until_kept(client: httpx.Client, entries: int) -> dict[str, Any]:
    """GET /cache once the tenant has so many entries, which are written after the reply."""
    end = time.monotonic() + 10
    while (stats := client.get("/cache").json())["entries"] != entries:
        assert time.monotonic() < end, stats
        time.sleep(0.02)
    return dict(stats)
