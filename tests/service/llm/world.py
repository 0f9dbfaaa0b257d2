"""A model and its memory that only know which history every place was filled with, and check all that is asked of them.

The key at position i of a sequence depends on its salt and on its tokens up to i; so a place holds just that. A batch
that reads another sequence's history, a copy or swap that comes too late, a page written while others read it: each
is an assertion that fails.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from cache.prefix.pages import PagePool
from cache.prefix.radix import RadixTree
from service.llm.request import Job, LlmRequest, SamplingParams, Sequence, State
from service.llm.scheduler import Batch, Policy, Scheduler
from service.llm.spaces import PagedSpace, ReservedSpace, VirtualSpace
from tests.cache.prefix.checks import check_tree

Kind = Literal["paged", "reserved", "virtual"]
EOS = 9
Token = Callable[[Sequence], int]


def ask(id: str, tokens: tuple[int, ...] = (1, 2, 3), max_tokens: int = 4, **changes) -> LlmRequest:
    params = SamplingParams(max_tokens=max_tokens, **changes.pop("params", {}))
    return LlmRequest(id=id, tokens=tokens, params=params, **changes)


class World:
    """A scheduler over a small memory, and the model that runs its batches."""

    def __init__(
        self,
        kind: Kind = "paged",
        pages: int = 64,
        size: int = 4,
        radix: bool = True,
        places: int = 0,
        slots: int = 4,
        max_length: int = 256,
        policy: Policy | None = None,
        seed: int = 0,
    ) -> None:
        self.kind, self.size, self.slots = kind, size, slots
        self.policy = policy or Policy(max_running=8, max_batch_tokens=16)
        self.pool = PagePool(pages, size)
        self.tree = RadixTree(self.pool) if kind == "paged" and radix else None
        self.space: PagedSpace | ReservedSpace | VirtualSpace
        if kind == "paged":
            self.space = PagedSpace(self.pool, self.tree, places)
        elif kind == "reserved":
            self.space = ReservedSpace(self.pool)
        else:
            self.space = VirtualSpace(slots, max_length, pages, self.pool.covering)
        self.scheduler = Scheduler(self.space, self.policy, max_length, frozenset([EOS]))
        self.now = 0.0
        self.ended: list[Sequence] = []
        self.done: list[str] = []
        self.started: list[str] = []
        self._rng = random.Random(seed)
        self._memory: dict[tuple[int, int], object] = {}  # (page, place); in a virtual space, (slot, position)
        self._host: dict[int, list[object]] = {}

    def add(self, request: LlmRequest) -> Job:
        return self.scheduler.add(request, self.now)

    def random_token(self, sequence: Sequence) -> int:
        """Few tokens, so that sequences often agree; the end now and then."""
        return self._rng.choice([1, 1, 2, EOS])

    def step(self, token: Token | None = None) -> Batch | None:
        """Schedule, run, commit, collect; everything is checked in between."""
        batch = self.scheduler.schedule(self.now)
        self.check()
        if batch is None:
            return None
        self.run(batch)
        self.commit(batch, token)
        return batch

    def commit(self, batch: Batch, token: Token | None = None) -> None:
        self.scheduler.commit(batch, [(token or self.random_token)(sequence) for sequence in batch.outputs])
        self.collect()
        self.check()
        self.now += 1.0

    def collect(self) -> None:
        ended = self.scheduler.collect()
        self.ended += ended.sequences
        self.done += [job.request.id for job in ended.jobs]

    def drain(self, steps: int = 3000, token: Token | None = None) -> None:
        """Step until nothing is live."""
        for _ in range(steps):
            if not self.scheduler.jobs:
                return
            assert self.step(token) is not None, "there is work, but nothing is scheduled"
        raise AssertionError(f"{len(self.scheduler.jobs)} requests are live after {steps} steps")

    def run(self, batch: Batch) -> None:
        self._check_batch(batch)
        self._move(batch)
        for chunk in batch.chunks:
            self._read(chunk.sequence, chunk.start)
        for chunk in batch.chunks:
            self._write(chunk.sequence, chunk.start, chunk.count)

    def check(self) -> None:
        """The books of memory are exact."""
        sequences = [sequence for job in self.scheduler.jobs.values() for sequence in job.sequences]
        running = [sequence for sequence in sequences if sequence.state is State.RUNNING]
        assert len(running) == self.scheduler.running <= self.policy.max_running
        for sequence in sequences:
            if sequence.state is not State.RUNNING:
                assert (sequence.pages, sequence.slot, sequence.node) == ([], -1, None)
            if sequence.state not in (State.RUNNING, State.SWAPPED):
                assert sequence.computed == 0
        if self.kind == "virtual":
            slots = [sequence.slot for sequence in running]
            assert len(set(slots)) == len(slots)
            assert all(0 <= slot < self.slots for slot in slots)
            assert sum(self.pool.covering(sequence.computed) for sequence in running) <= self.pool.pages
            return
        held = [page for sequence in running for page in sequence.pages]
        locked = [sequence.node for sequence in running if sequence.node is not None]
        check_tree(self.tree or RadixTree(self.pool), self.pool, locked, held)
        places = [place for sequence in sequences for place in sequence.places]
        assert len(set(places)) == len(places)

    def check_idle(self) -> None:
        """Nothing is live, and all memory comes back."""
        assert not self.scheduler.jobs
        if self.tree is not None:
            self.tree.evict(self.pool.pages)
            assert self.tree.roots == {}
        if self.kind == "virtual":
            # So much of the budget is free that a sequence of the greatest length gets in again, in every slot in turn.
            longest = (1,) * (self.space.capacity - 1)
            for number in range(self.slots):
                self.add(ask(f"last {number}", longest, 1))
            self.drain(token=lambda sequence: EOS)
        assert self.pool.free == self.pool.pages

    def _check_batch(self, batch: Batch) -> None:
        assert batch.chunks
        sequences = [chunk.sequence for chunk in batch.chunks]
        assert len(set(sequences)) == len(sequences)
        assert batch.tokens <= self.policy.max_batch_tokens
        assert [chunk.count == 1 for chunk in batch.chunks] == [at < batch.decodes for at in range(len(batch.chunks))]
        self.started += [job.request.id for job in batch.started]
        for chunk in batch.chunks:
            sequence = chunk.sequence
            assert sequence.state is State.RUNNING
            assert chunk.start == sequence.computed
            assert chunk.count >= 1
            last = chunk.start + chunk.count == len(sequence.tokens)
            assert chunk.outputs == ((sequence, *sequence.forks) if last else ())

    def _move(self, batch: Batch) -> None:
        moves = batch.moves
        assert not (moves.swap_outs and moves.swap_ins)
        targets = [to for _, to in moves.swap_ins + moves.copies]
        assert len(set(targets)) == len(targets)
        for slot in moves.frees:
            self._memory = {place: held for place, held in self._memory.items() if place[0] != slot}
        for page, place in moves.swap_outs:
            self._host[place] = self._page(page)
        for place, page in moves.swap_ins:
            self._fill(page, self._host.pop(place))
        before = {page: self._page(page) for page, _ in moves.copies}
        for page, to in moves.copies:
            assert self._page(page) == before[page], "copies one by one must give what copies at once do"
            self._fill(to, before[page])

    def _page(self, page: int) -> list[object]:
        return [self._memory.get((page, place)) for place in range(self.size)]

    def _fill(self, page: int, content: list[object]) -> None:
        for place, held in enumerate(content):
            self._memory[page, place] = held

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        if self.kind == "virtual":
            return sequence.slot, position
        page, place = divmod(position, self.size)
        return sequence.pages[page], place

    def _read(self, sequence: Sequence, length: int) -> None:
        for position in range(length):
            known = self._memory.get(self._place(sequence, position))
            assert known == history(sequence, position), f"position {position} of {sequence.request.id} is another's"

    def _write(self, sequence: Sequence, start: int, count: int) -> None:
        for position in range(start, start + count):
            place = self._place(sequence, position)
            assert self.kind == "virtual" or self.pool.writable(place[0]), f"page {place[0]} is read by others"
            self._memory[place] = history(sequence, position)


def history(sequence: Sequence, position: int) -> object:
    return sequence.request.salt, tuple(sequence.tokens[: position + 1])
