"""The language model of a process: its engine, the bridge to it, and what asks it for text."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from accel.memory.budget import DeviceMemory, Needs, split
from accel.memory.paged_kv import page_bytes
from accel.memory.virtual_kv import VirtualMemoryError
from accel.streams import urgent_stream
from models.bundles import registry
from models.errors import ModelError, PromptError
from models.llm.loading import DEFAULT, LanguageModel, load_llm
from models.rewriter.template import Message
from service.bridge import Bridge
from service.config import LlmSettings, ModelSettings, Settings
from service.errors import CancelledError, OutOfMemoryError, SetupError, invalid
from service.events import Cancelled, Failed
from service.faults import explained
from service.llm.assembly import Assembly, Figures, KvPlan, assemble
from service.llm.engine import Observer
from service.llm.request import Delta, LlmRequest, SamplingParams
from service.llm.scheduler import Policy

log = logging.getLogger(__name__)

PAGE_SIZE = 16  # tokens
CPU_KV_PAGES = 256
BATCH_TOKENS = 2048  # of one pass: a longer prompt is read in chunks, between which others get their tokens
WORKING_SHARE = 0.2  # of a GPU's memory that the process may take: for activations and captured graphs
DEVICE_PAGE = 2 << 20  # bytes, that a GPU maps at a time
URGENT = 10  # priority of rewrites: a picture waits for each, and they are short


class Writer:
    """Takes requests for text and writes it, once `bridge` has been started."""

    def __init__(self, model: LanguageModel, assembly: Assembly, bridge: Bridge[LlmRequest]) -> None:
        self.card = model.card
        self.tokenizer = model.tokenizer
        self.bridge = bridge
        self.device = model.decoder.device
        self._assembly = assembly

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self._assembly.scheduler.longest

    @property
    def figures(self) -> Figures:
        return self._assembly.figures

    def observe(self, observer: Observer) -> None:
        self._assembly.engine.observer = observer

    async def tokens_of(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """A conversation up to where the assistant speaks next.

        Raises:
            InputError: the model has no chat template, or its template refuses these messages.
        """
        try:
            return tuple(await asyncio.to_thread(self.tokenizer.encode_chat, messages))
        except PromptError as error:
            raise invalid("messages", list(messages), str(error)) from None

    async def tokens_in(self, text: str) -> tuple[int, ...]:
        return tuple(await asyncio.to_thread(self.tokenizer.encode, text))

    def check(self, request: LlmRequest) -> None:
        """Raise InputError for a request that could never run."""
        self._assembly.scheduler.check(request)

    def asked_by(self, namespace: str) -> Author:
        """A text model for `service.llm.rewrite.Rewriter`, which finds only this namespace's prefixes in memory."""
        return Author(self, namespace)

    async def forget(self, namespace: str) -> int:
        """Free the prefixes that requests of a namespace have left; how many pages that gives."""
        return await self.bridge.call(lambda: self._assembly.forget(namespace))

    async def close(self, grace_s: float) -> None:
        """Let live requests finish for `grace_s` seconds, cancel the rest, give the memory back."""
        await self.bridge.close(grace_s)
        if self.bridge.ended:  # else a pass goes on that still uses it
            self._assembly.close()


@dataclass(frozen=True, slots=True)
class Author:
    """A writer in a tenant's name."""

    writer: Writer
    namespace: str

    async def answer(self, messages: Sequence[Message], max_tokens: int) -> AsyncGenerator[str, None]:
        """The most likely answer, piece by piece. Closing the generator cancels the request.

        Raises the HeadstartError that the request ended with.
        """
        request = LlmRequest(
            id=uuid.uuid4().hex,
            tokens=await self.writer.tokens_of(messages),
            params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
            salt=self.namespace,
            priority=URGENT,
        )
        async with self.writer.bridge.submit(request) as events:
            async for event in events:
                if isinstance(event, Delta) and event.text:
                    yield event.text
                elif isinstance(event, Failed):
                    raise event.error
                elif isinstance(event, Cancelled):
                    raise CancelledError("the request was cancelled")


def wanted(settings: Settings) -> bool:
    """Whether the settings ask for a language model; "auto" does, unless it is a bundle that has not been fetched."""
    llm = settings.llm
    if llm.enabled != "auto":
        return llm.enabled == "on"
    bundle = DEFAULT if llm.model == "default" else llm.model
    if bundle not in registry.ROOTS:
        return True
    try:
        registry.bundle_path(bundle, settings.model.cache_dir)
    except ModelError:
        log.info("no language model: `headstart models pull %s` fetches it", bundle)
        return False
    return True


def load_writer_model(llm: LlmSettings, model: ModelSettings) -> LanguageModel:
    """Its weights, beside those of the image model. Raises ModelError."""
    adapter = None if llm.adapter is None else str(llm.adapter)
    return load_llm(llm.model, dtype=llm.dtype, device=model.device, cache_dir=model.cache_dir, lora=adapter)


def open_writer(
    model: LanguageModel, llm: LlmSettings, memory: DeviceMemory | None = None, needs: Needs | None = None
) -> Writer:
    """An engine of its own for a loaded model. Its bridge is not started yet.

    Args:
        memory: of the GPU, before anything was loaded to it; None: a CPU's, which is not split.
        needs: what is spoken for on it.

    Raises:
        SetupError: the memory does not suffice.
    """
    plan = kv_plan(model, llm, memory, needs or Needs())
    around = urgent_stream(model.decoder.device)
    policy = Policy(max_running=llm.max_running, max_batch_tokens=max(BATCH_TOKENS, llm.max_running))
    try:
        with around():
            assembly = assemble(model, policy, plan)
    except (ValueError, VirtualMemoryError) as error:
        raise SetupError(f"keys and values: {error}; --kv-pages sets how many", param="llm.kv_pages") from None
    except (RuntimeError, MemoryError) as error:
        reason = explained(error, f"reserving {plan.budget_bytes / 1e9:.1f} GB for keys and values")
        if not isinstance(reason, OutOfMemoryError):
            raise
        raise SetupError(f"{reason.message}; --kv-pages sets how many", param="llm.kv_pages") from None
    bridge = Bridge(assembly.engine, llm, noun="answers", thread="llm", around=around)
    return Writer(model, assembly, bridge)


def kv_plan(model: LanguageModel, llm: LlmSettings, memory: DeviceMemory | None, needs: Needs) -> KvPlan:
    """Memory for keys and values: on a GPU what the others leave of it, on a CPU a number of pages."""
    config = model.config
    one = page_bytes(config.layers, PAGE_SIZE, config.kv_heads, config.head_dim, model.decoder.dtype)
    longest = -(-config.max_positions // PAGE_SIZE)
    most = llm.kv_pages or (CPU_KV_PAGES if memory is None else llm.max_running * longest)
    pages = min(most, llm.max_running * longest)
    kind: Literal["paged", "virtual"] = "virtual" if llm.kv_backend == "virtual" else "paged"
    partial = llm.max_running * DEVICE_PAGE if kind == "virtual" else 0  # the last page of each sequence
    if memory is not None:
        share = llm.gpu_memory_fraction
        working = needs.working + int(WORKING_SHARE * share * memory.total) + partial
        needs = dataclasses.replace(needs, working=working)
        try:
            pages = split(memory, share, needs, one, min(longest, most), pages).kv_pages
        except ValueError as error:
            raise SetupError(str(error), param="llm.gpu_memory_fraction") from None
    log.info("keys and values: %d pages of %d tokens, %.0f MB, %s", pages, PAGE_SIZE, pages * one / 1e6, kind)
    return KvPlan(budget_bytes=pages * one + partial, kind=kind, page_size=PAGE_SIZE)
