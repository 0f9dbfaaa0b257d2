"""The loaded models, their engines, and the bridges to them: what `serve` and `generate` both draw with."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

from accel.memory.budget import DeviceMemory, Needs, device_memory
from models.diffusion.dtype import resolve_device
from models.diffusion.model import ModelCard
from models.errors import ModelError
from models.llm.loading import LanguageModel
from service.bridge import Bridge
from service.config import DEFAULT_TENANT, EngineSettings, Settings
from service.diffusion.admission import MAX_PICTURES, resolve
from service.diffusion.degrees import Degrees
from service.diffusion.engine import DiffusionEngine, Observer
from service.diffusion.ranks import Ranks, get_ready, open_ranks
from service.diffusion.request import Draft, ImageRequest
from service.diffusion.starts import Starts
from service.errors import InputError, renamed
from service.events import MAX_SEED, Failed
from service.latents import Latents
from service.llm.rewrite import Rewrite
from service.loading import load_chosen
from service.rewriting import Rewriting
from service.writer import Writer, load_writer_model, open_writer, wanted

log = logging.getLogger(__name__)

FLOAT32 = 4  # bytes
SETTLE_S = 2.0  # for latents on their way to the cache, when it closes


class Runtime:
    """Takes drafts and draws them, once `bridge` has been started.

    latents: None where there is no cache.
    writer, rewriting: None where there is no language model.
    ranks, degrees: None where there is one GPU.
    settle: waits, so many seconds at most, until the latents of completed requests are with the cache.
    """

    def __init__(
        self,
        card: ModelCard,
        bridge: Bridge[ImageRequest],
        limits: EngineSettings,
        latents: Latents | None = None,
        settle: Callable[[float], None] = lambda _seconds: None,
        writer: Writer | None = None,
        rewriting: Rewriting | None = None,
        ranks: Ranks | None = None,
        degrees: Degrees | None = None,
    ) -> None:
        self.card = card
        self.bridge = bridge
        self.latents = latents
        self.writer = writer
        self.ranks = ranks
        self._degrees = degrees
        self._rewriting = rewriting
        self._settle = settle
        self._limits = limits

    def start(self) -> None:
        """Start the engines' threads."""
        if self.ranks is not None:
            self.ranks.on_lost = self.bridge.wake
        self.bridge.start()
        if self.writer is not None:
            self.writer.bridge.start()

    def namespace(self, tenant: str) -> str:
        """Where what a tenant leaves in memory and on disk may be found again."""
        return tenant if self.latents is None else self.latents.namespace(tenant)

    async def rewrite(self, prompt: str, tenant: str) -> Rewrite:
        """The prompt rewritten for this image model, or why it was not."""
        if self._rewriting is None:
            return Rewrite(prompt, prompt, "unavailable", "no language model is loaded", 0.0)
        return await self._rewriting.rewrite(prompt, self.namespace(tenant))

    def resolve(self, draft: Draft, names: Mapping[str, str]) -> ImageRequest:
        """The draft checked and completed, with an id of its own.

        Args:
            names: what the caller calls a field of the draft, where that is not its name (see `renamed`).

        Raises:
            InputError: in the caller's names.
        """
        seed = secrets.randbelow(MAX_SEED + 1)
        try:
            return resolve(draft, self.card, self._limits, id=uuid.uuid4().hex, random_seed=seed, degrees=self._degrees)
        except InputError as error:
            raise renamed(error, names) from None

    def position(self, request_id: str) -> int:
        """A waiting request's place by the scheduler's rule of age, from 1; 1 too for one that starts just now."""
        waiting = cast(list[tuple[ImageRequest, float]], self.bridge.waiting())
        turns = {request.id: since - request.priority * self._limits.ageing_s for request, since in waiting}
        turn = turns.get(request_id)
        return 1 if turn is None else sum(other <= turn for other in turns.values())

    def measure(self, size: tuple[int, int] | None = None) -> None:
        """Find out how many GPUs are worth sharing pictures of this (width, height), where no setting says it.

        Called before `start`. None: of the model's own size, and of its multiples that are allowed.
        """
        if self.ranks is None or self._degrees is None or not self._degrees.automatic:
            return
        width, height = self.card.default_size
        doublings = itertools.count()
        sizes = [size] if size is not None else ((width << each, height << each) for each in doublings)
        most = self._limits.max_pixels
        self._degrees.seconds = self.ranks.measure(itertools.takewhile(lambda one: one[0] * one[1] <= most, sizes))

    async def with_cache(self, request: ImageRequest, draft: Draft, mode: str, tenant: str) -> ImageRequest:
        """The request of a draft, told whose it is and what the cache may do for it (see `Latents.intent`)."""
        tenant = self.namespace(tenant)
        if self.latents is None:
            return replace(request, tenant=tenant)
        seeded = draft.seed not in (None, -1)
        intent = await self.latents.intent(request.prompt, mode, seeded, tenant)
        return replace(request, tenant=tenant, cache=intent)

    async def close(self, grace_s: float) -> None:
        """Let live requests finish for `grace_s` seconds, cancel the rest, and write what is still to be cached."""
        closing = [self.bridge.close(grace_s)]
        if self.writer is not None:
            closing.append(self.writer.close(grace_s))
        await asyncio.gather(*closing)
        if self.ranks is not None:
            await asyncio.to_thread(self.ranks.close)
        if self.latents is not None:
            await asyncio.to_thread(self._settle, SETTLE_S)
            await asyncio.to_thread(self.latents.close)

    async def warm_up(self) -> None:
        """Draw one picture on every GPU in one step, and rewrite a prompt, so that the first client does not pay for
        what is made on first use.

        Raises the error of a model that cannot draw.
        """
        label = None if self.card.num_classes is None else 0
        count = 1 if self.ranks is None else min(self.ranks.gpus, MAX_PICTURES)
        draft = Draft(prompt="warming up", n=count, num_inference_steps=1, class_label=label, patch_degree=1)
        request = self.resolve(draft, {})
        async for event in self.bridge.submit(request):
            if isinstance(event, Failed):
                raise event.error
        await self.warm_up_rewriting()

    async def warm_up_rewriting(self) -> None:
        """Rewrite one prompt, with time: what all of the default tenant's begin with is in memory then."""
        if self._rewriting is not None:
            warmed = await self._rewriting.warm_up(self.namespace(DEFAULT_TENANT))
            log.info("the language model was warmed up in %.1f s: %s", warmed.seconds, warmed.outcome)


def open_runtime(settings: Settings, *, cached: bool = False, writing: bool = False) -> Runtime:
    """Load the model. Its bridge is not started yet.

    Args:
        cached: open the latent cache too, unless the settings say otherwise.
        writing: load the language model too, unless the settings say otherwise.

    Raises ModelError, and SetupError for a policy or a URL that is none, or memory that does not suffice.
    """
    return _open(settings, cached, writing)[0]


def open_warm_runtime(
    settings: Settings, observer: Observer, *, cached: bool = False, writing: bool = False
) -> Runtime:
    """The same, with its bridges started and its engines warmed up, which the observer is not told of.

    For a thread that runs no event loop.
    """
    runtime, engine = _open(settings, cached, writing)
    runtime.measure()
    runtime.start()
    asyncio.run(runtime.warm_up())
    engine.observer = observer
    return runtime


def _open(settings: Settings, cached: bool, writing: bool) -> tuple[Runtime, DiffusionEngine]:
    chosen = settings.model
    writing = writing and wanted(settings)
    get_ready(chosen, settings.ranks)
    memory = _gpu_memory(settings) if writing else None
    model = load_chosen(chosen)
    language = _language_model(settings) if writing else None
    latents: Latents | None = None
    starts: Starts | None = None
    if cached and settings.cache.enabled:
        from service.opening import open_latents  # with faiss, which few commands need

        latents, starts = open_latents(settings, model) or (None, None)
    ranks, degrees = open_ranks(model, settings)
    engine = DiffusionEngine(model, settings.engine, starts=starts, ranks=ranks)
    bridge: Bridge[ImageRequest] = Bridge(engine, settings.engine)
    writer = rewriting = None
    if language is not None:
        needs = None if memory is None else _needs(settings, model.card, memory)
        writer = open_writer(language, settings.llm, memory, needs)
        rewriting = Rewriting(writer, model.reader(), settings.llm.rewrite_budget_s)
    runtime = Runtime(model.card, bridge, settings.engine, latents, engine.settle, writer, rewriting, ranks, degrees)
    return runtime, engine


def _language_model(settings: Settings) -> LanguageModel | None:
    """None, and a line in the log, where "auto" finds one that cannot be loaded."""
    try:
        return load_writer_model(settings.llm, settings.model)
    except ModelError as error:
        if settings.llm.enabled == "on":
            raise
        log.warning("no language model: %s", error)
        return None


def _gpu_memory(settings: Settings) -> DeviceMemory | None:
    """Of the GPU that the models run on, before anything is loaded to it; None for a CPU."""
    device = resolve_device(settings.model.device)
    return None if device.type == "cpu" else device_memory(device)


def _needs(settings: Settings, card: ModelCard, memory: DeviceMemory) -> Needs:
    """What is spoken for before pages of keys and values are counted."""
    device = resolve_device(settings.model.device)
    pixels = settings.engine.max_pixels // card.scale**2
    latents = 2 * FLOAT32 * card.latent_channels * pixels * settings.engine.max_running  # x and previous
    return Needs(weights=memory.free - device_memory(device).free, latents=latents)
