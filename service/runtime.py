"""A loaded model, its engine, and the bridge to it: what `serve` and `generate` both draw with."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace

from models.diffusion.loading import load_model
from models.diffusion.model import ModelCard
from service.bridge import Bridge
from service.config import EngineSettings, Settings
from service.diffusion.admission import resolve
from service.diffusion.engine import DiffusionEngine, Observer
from service.diffusion.request import Draft, ImageRequest
from service.diffusion.starts import Starts
from service.errors import InputError
from service.events import MAX_SEED, Failed
from service.latents import Latents

SETTLE_S = 2.0  # for latents on their way to the cache, when it closes


class Runtime:
    """Takes drafts and draws them, once `bridge` has been started.

    latents: None where there is no cache.
    settle: waits, so many seconds at most, until the latents of completed requests are with the cache.
    """

    def __init__(
        self,
        card: ModelCard,
        bridge: Bridge[ImageRequest],
        limits: EngineSettings,
        latents: Latents | None = None,
        settle: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self.card = card
        self.bridge = bridge
        self.latents = latents
        self._settle = settle
        self._limits = limits

    def resolve(self, draft: Draft, names: Mapping[str, str]) -> ImageRequest:
        """The draft checked and completed, with an id of its own.

        Args:
            names: what the caller calls a field of the draft, where that is not its name; "size: width" for a part of
                one.

        Raises:
            InputError: in the caller's names.
        """
        seed = secrets.randbelow(MAX_SEED + 1)
        try:
            return resolve(draft, self.card, self._limits, id=uuid.uuid4().hex, random_seed=seed)
        except InputError as error:
            field = error.param or ""
            name = names.get(field, field)
            message = name + error.message.removeprefix(field)
            raise InputError(message, param=name.partition(":")[0], code=error.code) from None

    async def with_cache(self, request: ImageRequest, draft: Draft, mode: str, tenant: str) -> ImageRequest:
        """The request of a draft, told whose it is and what the cache may do for it (see `Latents.intent`)."""
        if self.latents is None:
            return replace(request, tenant=tenant)
        tenant = self.latents.namespace(tenant)
        seeded = draft.seed not in (None, -1)
        intent = await self.latents.intent(request.prompt, mode, seeded, tenant)
        return replace(request, tenant=tenant, cache=intent)

    async def close(self, grace_s: float) -> None:
        """Let live requests finish for `grace_s` seconds, cancel the rest, and write what is still to be cached."""
        await self.bridge.close(grace_s)
        if self.latents is not None:
            await asyncio.to_thread(self._settle, SETTLE_S)
            await asyncio.to_thread(self.latents.close)

    async def warm_up(self) -> None:
        """Draw one picture in one step, so that the first client does not pay for what is made on first use.

        Raises the error of a model that cannot draw.
        """
        label = None if self.card.num_classes is None else 0
        request = self.resolve(Draft(prompt="warming up", num_inference_steps=1, class_label=label), {})
        async for event in self.bridge.submit(request):
            if isinstance(event, Failed):
                raise event.error


def open_runtime(settings: Settings, *, cached: bool = False) -> Runtime:
    """Load the model. Its bridge is not started yet.

    Args:
        cached: open the latent cache too, unless the settings say otherwise.

    Raises ModelError, and SetupError for a policy or a URL that is none.
    """
    return _open(settings, cached)[0]


def open_warm_runtime(settings: Settings, observer: Observer, *, cached: bool = False) -> Runtime:
    """The same, with its bridge started and its engine warmed up, which the observer is not told of.

    For a thread that runs no event loop.
    """
    runtime, engine = _open(settings, cached)
    runtime.bridge.start()
    asyncio.run(runtime.warm_up())
    engine.observer = observer
    return runtime


def _open(settings: Settings, cached: bool) -> tuple[Runtime, DiffusionEngine]:
    chosen = settings.model
    model = load_model(
        chosen.model,
        revision=chosen.revision,
        dtype=chosen.dtype,
        device=chosen.device,
        loras=chosen.loras,
        cache_dir=chosen.cache_dir,
    )
    latents: Latents | None = None
    starts: Starts | None = None
    if cached and settings.cache.enabled:
        from service.opening import open_latents  # with faiss, which few commands need

        latents, starts = open_latents(settings, model) or (None, None)
    engine = DiffusionEngine(model, settings.engine, starts=starts)
    bridge: Bridge[ImageRequest] = Bridge(engine, settings.engine)
    return Runtime(model.card, bridge, settings.engine, latents, engine.settle), engine
