"""`headstart cache stats | purge | warm`: on the store itself, or through a server that uses it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from service.config import DEFAULT_TENANT, Settings
from service.diffusion.request import Draft, parse_size
from service.errors import HeadstartError, SetupError
from service.evaluation.prompts import read_prompts
from service.events import Failed
from service.oneshot import FLAGS, say

if TYPE_CHECKING:
    from cache.latent.store import Store
    from service.runtime import Runtime

AT_ONCE = 4  # requests that a server gets from `warm` at a time
TIMEOUT_S = 600.0


def stats(chosen: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """What the server says of the key's tenant or, without --url, what the store holds of each tenant.

    Raises:
        SetupError: the store or the server cannot be asked.
        ModelError: there is no such model.
    """
    if chosen.url is not None:
        return Client(chosen.url, settings).ask("GET", "/cache", tenant=chosen.tenant)
    entries: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    with _store(settings) as (model, store):
        for header in store.headers():
            entries[header.space.tenant] += 1
            sizes[header.space.tenant] += sum(header.sizes)
        damaged = store.damaged
    names = sorted(entries) if chosen.tenant is None else [chosen.tenant]
    tenants = {name: {"entries": entries[name], "bytes": sizes[name]} for name in names}
    return {"model": model, "tenants": tenants, "damaged": damaged}


def purge(chosen: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Forget entries, of one prompt or all: the key's tenant's or, without --url, those of --tenant or of everyone.

    Raises: as `stats`.
    """
    if chosen.url is not None:
        return Client(chosen.url, settings).ask("DELETE", "/cache", prompt=chosen.prompt, tenant=chosen.tenant)
    prompt = None if chosen.prompt is None else chosen.prompt.strip()
    with _store(settings) as (model, store):
        doomed = [
            header.id
            for header in store.headers()
            if chosen.tenant in (None, header.space.tenant) and prompt in (None, header.prompt)
        ]
        for id in doomed:
            store.remove(id)
    return {"model": model, "purged": len(doomed)}


def warm(chosen: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Draw the prompts of a file, each once and from scratch, for what they leave in the cache.

    Raises:
        SetupError, InputError, ModelError: the caller can mend it.
        HeadstartError: drawing failed.
    """
    prompts = list(dict.fromkeys(prompt.record["prompt"] for prompt in read_prompts(chosen.file)))
    width = height = None
    if chosen.size is not None:
        width, height = parse_size("--size", chosen.size, "WIDTHxHEIGHT, such as 256x256")
    if chosen.url is not None:
        return _warm_server(Client(chosen.url, settings), prompts, chosen)
    say(f"loading {settings.model.model}", chosen.quiet)
    from service.runtime import open_runtime  # seconds, for torch

    runtime = open_runtime(settings, cached=True)
    if runtime.latents is None:
        raise SetupError("there is no cache to fill; the log says why")
    drafts = [
        Draft(
            prompt=prompt,
            negative_prompt=chosen.negative,
            width=width,
            height=height,
            num_inference_steps=chosen.steps,
            guidance_scale=chosen.guidance,
            sampler=chosen.sampler,
        )
        for prompt in prompts
    ]
    tenant = chosen.tenant or DEFAULT_TENANT
    asyncio.run(_warm(runtime, drafts, tenant, 2 * settings.engine.max_running, chosen.quiet))
    left = runtime.latents.stats(tenant)
    return {"drawn": len(drafts)} | {name: left[name] for name in ("stored", "dropped", "evicted", "entries", "bytes")}


async def _warm(runtime: Runtime, drafts: Sequence[Draft], tenant: str, at_once: int, quiet: bool) -> None:
    room = asyncio.Semaphore(at_once)

    async def draw(draft: Draft) -> None:
        async with room:
            request = await runtime.with_cache(runtime.resolve(draft, FLAGS), draft, "refresh", tenant)
            async for event in runtime.bridge.submit(request):
                if isinstance(event, Failed):
                    raise event.error
        bar.update()

    runtime.bridge.start()
    try:
        with tqdm(total=len(drafts), unit="picture", leave=False, disable=quiet or None) as bar:
            await asyncio.gather(*map(draw, drafts))
    finally:
        await runtime.close(0)


def _warm_server(client: Client, prompts: Sequence[str], chosen: argparse.Namespace) -> dict[str, Any]:
    picture = {
        "negative_prompt": chosen.negative,
        "size": chosen.size,
        "num_inference_steps": chosen.steps,
        "guidance_scale": chosen.guidance,
        "sampler": chosen.sampler,
    }

    def draw(prompt: str) -> None:
        client.ask("POST", "/generate", {"prompt": prompt, "cache": "refresh", "output_format": "jpeg"} | picture)
        bar.update()

    client.ask("GET", "/cache", tenant=chosen.tenant)  # a mistake shows before anything is drawn
    with (
        ThreadPoolExecutor(AT_ONCE) as pool,
        tqdm(total=len(prompts), unit="picture", leave=False, disable=chosen.quiet or None) as bar,
    ):
        calls = [pool.submit(draw, prompt) for prompt in prompts]
        try:
            for call in calls:
                call.result()
        finally:
            for call in calls:
                call.cancel()
    return {"drawn": len(prompts)}


class Client:
    """A server, asked with the key of the settings."""

    def __init__(self, url: str, settings: Settings) -> None:
        """Raises SetupError unless url is http:// or https://."""
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise SetupError(f"--url: {url!r} is not allowed; http://HOST:PORT or https://HOST")
        self._url = url.rstrip("/")
        self._key = settings.server.api_key

    def ask(self, method: str, path: str, body: Any = None, **query: str | None) -> dict[str, Any]:
        """The reply's JSON. Waits and asks again where the server is busy.

        Raises:
            SetupError: the server cannot be reached, or refuses.
            HeadstartError: it failed.
        """
        given = {name: value for name, value in query.items() if value is not None}
        address = f"{self._url}{path}" + (f"?{urllib.parse.urlencode(given)}" if given else "")
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        while True:
            request = urllib.request.Request(address, data, headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                    answer: dict[str, Any] = json.load(reply)
                    return answer
            except urllib.error.HTTPError as error:
                with error:
                    if error.code == 429:
                        time.sleep(float(error.headers.get("Retry-After", 1)))
                        continue
                    kind = SetupError if error.code < 500 else HeadstartError
                    raise kind(f"{self._url}: {_reason(error)}") from None
            except (OSError, ValueError) as error:
                reason = getattr(error, "reason", error)
                raise SetupError(f"{self._url}: cannot be asked: {reason}") from None


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}"


@contextlib.contextmanager
def _store(settings: Settings) -> Iterator[tuple[str, Store]]:
    """The store of the settings' model, which need not be loaded for that."""
    from cache.latent.store import StoreError
    from models.diffusion.source import resolve_source
    from service.stores import identity, open_store

    chosen = settings.model
    source = resolve_source(chosen.model, chosen.revision, chosen.cache_dir)
    model = identity(source.name, source.revision, source.path)
    store = open_store(settings, model)
    try:
        yield model, store
    except StoreError as error:
        raise SetupError(f"{error}; a server that uses it can be asked with --url") from None
    finally:
        store.close()
