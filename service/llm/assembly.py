"""Puts an engine together: KV memory of one kind, the books kept of it, a scheduler, a runner."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from accel.memory.paged_kv import HostPages, PagedKV, page_bytes
from accel.memory.virtual_kv import VirtualKV
from cache.prefix.pages import PagePool
from cache.prefix.radix import RadixTree
from models.llm.loading import LanguageModel
from models.llm.tokenizer import Detokenizer
from service.llm.engine import LlmEngine, Observer
from service.llm.memory import KvMemory, PagedMemory, VirtualMemory
from service.llm.runner import Runner
from service.llm.scheduler import Policy, Scheduler
from service.llm.spaces import KvSpace, PagedSpace, ReservedSpace, VirtualSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPlan:
    """What memory keys and values get.

    Args:
        kind: "paged"; "virtual", contiguous in virtual memory; "reserved", the baseline that sets pages aside for the
            longest that a sequence may become.
        budget_bytes: on the device.
        host_bytes: pinned, for pages of sequences that are swapped out.
        prefixes: whether prefixes stay in memory for others that begin alike (paged only).
        max_length: tokens of one sequence; None: as many as the model reads.
    """

    budget_bytes: int
    kind: Literal["paged", "virtual", "reserved"] = "paged"
    host_bytes: int = 0
    page_size: int = 16  # tokens
    prefixes: bool = True
    max_length: int | None = None


class Figures(NamedTuple):
    """Tokens since the start, and pages of keys and values now.

    prompt: of requests that have started. cached: of these, found in memory. pages_used: by live requests. pages_kept:
    of prefixes that no live request uses, there for the next one and for whoever needs room.
    """

    prompt: int
    cached: int
    generated: int
    preemptions: int
    pages: int
    pages_used: int
    pages_kept: int


class Assembly(NamedTuple):
    """An engine and those of its parts whose figures are worth showing."""

    engine: LlmEngine
    scheduler: Scheduler
    pool: PagePool | None = None
    tree: RadixTree | None = None
    virtual: VirtualKV | None = None

    @property
    def figures(self) -> Figures:
        """From any thread; each figure is right, though not all of the same moment."""
        of = self.scheduler
        pages, used, kept = 0, 0, 0
        if self.pool is not None:
            pages, used = self.pool.pages, of.pages_used
            kept = max(0, pages - self.pool.free - used)
        elif self.virtual is not None:
            pages = self.virtual.budget_bytes // self.virtual.page_bytes
            used = pages - self.virtual.pages_available
        return Figures(of.prompt_tokens, of.cached_tokens, of.generated_tokens, of.preemptions, pages, used, kept)

    def forget(self, salt: str) -> int:
        """Free the prefixes of a salt that no live request uses; how many pages that gives. On the engine's thread."""
        return 0 if self.tree is None else self.tree.forget(salt)

    def close(self) -> None:
        """Give memory back that is not torch's. Nothing may step the engine any more."""
        if self.virtual is not None:
            self.virtual.close()


def assemble(
    model: LanguageModel,
    policy: Policy,
    plan: KvPlan,
    observer: Observer | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Assembly:
    """An engine for a model.

    Raises:
        ValueError: the budget holds not even one page, or a field is out of range.
    """
    config, dtype, device = model.config, model.decoder.dtype, model.decoder.device
    length = min(plan.max_length or config.max_positions, config.max_positions)
    space: KvSpace
    memory: KvMemory
    pool, tree, virtual = None, None, None
    if plan.kind == "virtual":
        sizes = (config.layers, policy.max_running, length, config.kv_heads, config.head_dim)
        virtual = VirtualKV(*sizes, dtype, device, plan.budget_bytes)
        pages = virtual.budget_bytes // virtual.page_bytes
        space = VirtualSpace(policy.max_running, length, pages, virtual.pages_for)
        memory = VirtualMemory(virtual, config.scale)
    else:
        one = page_bytes(config.layers, plan.page_size, config.kv_heads, config.head_dim, dtype)
        count = plan.budget_bytes // one
        if count < 1:
            raise ValueError(f"budget_bytes: {plan.budget_bytes} is not allowed; allowed: at least one page, {one}")
        sizes = (config.layers, count, plan.page_size, config.kv_heads, config.head_dim)
        kv = PagedKV(*sizes, dtype, device)
        pool, places = PagePool(count, plan.page_size), plan.host_bytes // one
        if plan.kind == "reserved":
            space = ReservedSpace(pool)
        else:
            tree = RadixTree(pool) if plan.prefixes else None
            space = PagedSpace(pool, tree, places)
        memory = PagedMemory(kv, HostPages(kv, places) if places else None, length, config.scale)
    scheduler = Scheduler(space, policy, length, model.tokenizer.stop_tokens)
    runner = Runner(model, memory, policy.max_running)
    engine = LlmEngine(runner, scheduler, partial(Detokenizer, model.tokenizer), observer, clock)
    return Assembly(engine, scheduler, pool, tree, virtual)
