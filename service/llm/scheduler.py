"""Which tokens are computed next. Knows no torch, and is the only code that changes a sequence's state.

An engine's step is

    batch = scheduler.schedule(now)           # None: nothing to do; batch.started are new
    tokens = run(batch)                       # one for each of batch.outputs
    scheduler.commit(batch, tokens)           # ends choices by length and by end-of-sequence tokens
    scheduler.finish(sequence, "stop")        # for those whose text holds a stop string
    scheduler.collect()                       # choices and requests that have ended, also when there was no batch

with `add`, `end`, `expired` and `jobs` between steps.

Sequences stand in the order of `turn`, which is `arrived - priority * ageing_s` of their request: waiting `ageing_s` is
worth one point of priority. The first of them always gets the memory it needs, from the last ones if need be; since it
ends after so many tokens, every request does. (Preempting the latest: PagedAttention, Kwon et al. 2023.)

Those who wait are admitted by the longest prefix in memory (RadixAttention, Zheng et al. 2024), but while some have
waited for `ageing_s`, one of every AGED_SHARE admitted is the first of those in turn. So no one starves; and under a
load at which all wait that long, most of what comes in still finds its prefix in memory, where strict turns would make
the load heavier yet. When the next in line finds no memory, no one passes it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal, NamedTuple

from service.errors import InputError, invalid
from service.events import MAX_SEED
from service.llm.request import Job, LlmRequest, Reason, Sequence, State, Turn
from service.llm.spaces import KvSpace, Moves

AGED_SHARE = 4  # of so many admitted, one has aged, if any has
LOOKAHEAD = 128  # how many of those who wait have their prefixes looked up, oldest first (as many as SGLang's)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How work is chosen.

    Args:
        mode: "continuous": sequences join and leave at every step (Orca, Yu et al. 2022), prompts are read in chunks
            beside those that generate. The two baselines: "static": new ones join only when all have ended; "request":
            as static, and those that have ended are told of only then (request-level scheduling).
        preemption: whether a preempted sequence is computed again, or swapped to the host while there are places.
        order: of admission: by longest prefix in memory, with ageing, or by turn.
        max_running: sequences in memory.
        max_batch_tokens: tokens of one step.
        ageing_s: see above.
    """

    mode: Literal["continuous", "static", "request"] = "continuous"
    preemption: Literal["recompute", "swap"] = "recompute"
    order: Literal["lpm", "fcfs"] = "lpm"
    max_running: int = 256
    max_batch_tokens: int = 2048
    ageing_s: float = 5.0

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ValueError(f"max_running is {self.max_running}, expected at least 1")
        if self.max_batch_tokens < self.max_running:
            allowed = f"at least max_running, which is {self.max_running}"
            raise ValueError(f"max_batch_tokens is {self.max_batch_tokens}, expected {allowed}")
        if not self.ageing_s >= 0:
            raise ValueError(f"ageing_s is {self.ageing_s}, expected at least 0 seconds")


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + count) of a sequence, computed in one batch.

    outputs: who is given a token sampled from the logits of the chunk's last row: no one when tokens of the sequence
    remain to be computed, all choices of the request when they fork here, else the sequence itself.
    """

    sequence: Sequence
    start: int
    count: int
    outputs: tuple[Sequence, ...]


@dataclass(slots=True)
class Batch:
    """One pass through the model. The runner makes `moves` in their order, then computes the chunks together."""

    chunks: list[Chunk]  # never empty; those of one token first
    decodes: int  # how many chunks have one token
    moves: Moves
    started: list[Job]  # requests that were given memory for the first time

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def outputs(self) -> list[Sequence]:
        """Who is given a token, in the order in which `Scheduler.commit` wants them."""
        return [sequence for chunk in self.chunks for sequence in chunk.outputs]


class Ended(NamedTuple):
    """Choices that have ended, and the requests of which these were the last."""

    sequences: list[Sequence]
    jobs: list[Job]


class Scheduler:
    """Queues of sequences over one KV space.

    Args:
        max_length: tokens that the model can read, prompt and answer together.
        eos: tokens that end a sequence.
    """

    def __init__(self, space: KvSpace, policy: Policy, max_length: int, eos: frozenset[int] = frozenset()) -> None:
        self.jobs: dict[str, Job] = {}
        self.preemptions = 0
        self.prompt_tokens = 0  # of sequences that have started
        self.cached_tokens = 0  # of these, found in memory
        self.generated_tokens = 0
        self._space = space
        self._policy = policy
        self.longest = min(max_length, space.capacity)  # tokens of a prompt and its answer
        self._eos = eos
        self._running: list[Sequence] = []
        self._queues: dict[State, list[Sequence]] = {  # each in the order of turns
            State.RUNNING: self._running,
            State.SWAPPED: [],
            State.PREEMPTED: [],
            State.WAITING: [],
        }
        self._ended: list[Sequence] = []
        self._deadlines: list[Job] = []  # the next one first
        self._arrivals = 0
        self._admissions = 0
        self._first: Sequence | None = None  # in line, for which there was no memory the last time

    @property
    def running(self) -> int:
        """Sequences in memory."""
        return len(self._running)

    @property
    def pages_used(self) -> int:
        """Pages that running sequences hold, shared ones counted once; from any thread."""
        return len({page for sequence in list(self._running) for page in list(sequence.pages)})

    def check(self, request: LlmRequest) -> None:
        """Raise InputError, as `add`, for a request that could never run. From any thread."""
        prompt, answer, longest = len(request.tokens), request.params.max_tokens, self.longest
        if prompt >= longest:
            message = f"the prompt has {prompt} tokens; at most {longest - 1} are allowed, and one for the answer"
            raise InputError(message, param="prompt", code="context_length_exceeded")
        if prompt + answer > longest:
            room = longest - prompt
            raise invalid("max_tokens", answer, f"at most {room}: the prompt has {prompt} tokens of {longest}")
        if request.n > self._policy.max_running:
            raise invalid("n", request.n, f"at most {self._policy.max_running}: as many sequences can run")

    def add(self, request: LlmRequest, now: float) -> Job:
        """Queue a request; its id must not be that of a live one.

        Raises:
            InputError: it could never run: prompt and answer are longer than the model or the memory allows, or it asks
                for more choices than may run.
        """
        if request.id in self.jobs:
            raise ValueError(f"request {request.id} is live already")
        self.check(request)
        job = self.jobs[request.id] = Job(request, now)
        urgency = now - request.priority * self._policy.ageing_s
        for index in range(request.n):
            turn, seed = (urgency, self._arrivals, index), (request.params.seed + index) % (MAX_SEED + 1)
            job.sequences.append(Sequence(job, index, seed, turn, list(request.tokens), State.WAITING))
        first, *others = job.sequences
        if self._space.shares:
            first.forks = others
            for sequence in others:
                sequence.state = State.FORKING
        waiting = [first] if self._space.shares else job.sequences
        for sequence in waiting:
            bisect.insort(self._queues[State.WAITING], sequence, key=_turn)
        if request.deadline_s is not None:
            bisect.insort(self._deadlines, job, key=_deadline)
        self._arrivals += 1
        return job

    def expired(self, now: float) -> list[Job]:
        """Requests whose deadline has passed."""
        return self._deadlines[: bisect.bisect_right(self._deadlines, now, key=_deadline)]

    def schedule(self, now: float) -> Batch | None:
        """Choose the next batch: who generates, who goes on reading, who comes in."""
        ones: list[Chunk] = []  # of one token
        more: list[Chunk] = []
        started: list[Job] = []
        calm, reading = self._generate(ones)
        coming = self._admitted(now, started) if calm else ()  # while memory is short, no one comes in
        budget = self._policy.max_batch_tokens - len(ones)
        for sequence in itertools.chain(reading, coming):
            count = min(len(sequence.tokens) - sequence.computed, budget)
            if count:
                (ones if count == 1 else more).append(_chunk(sequence, count))
                budget -= count
            if not budget and self._policy.mode == "continuous":  # the other modes admit their whole batch at once
                break
        if not (ones or more):
            return None
        return Batch(ones + more, len(ones), self._space.moves(), started)

    def commit(self, batch: Batch, tokens: Items[int]) -> None:
        """The batch was computed, and these tokens were sampled for its outputs."""
        given = iter(tokens)
        for chunk in batch.chunks:
            sequence, outputs = chunk.sequence, chunk.outputs
            drawn = list(itertools.islice(given, len(outputs)))
            if sequence.state is not State.RUNNING:  # its request has ended meanwhile
                continue
            sequence.computed = chunk.start + chunk.count
            if outputs and not sequence.generated:
                self._space.keep(sequence)
                self._fork(sequence)
            for output, token in zip(outputs, drawn, strict=True):
                self._give(output, token)

    def finish(self, sequence: Sequence, reason: Reason) -> None:
        """End a choice for a reason that the scheduler cannot see, even if it has just ended for another."""
        if sequence.state is State.RUNNING:
            self._end(sequence, reason)
        elif sequence.state is State.ENDED:
            sequence.reason = reason

    def collect(self) -> Ended:
        """What has ended since the last call; in the mode "request", nothing while any of the batch goes on."""
        if self._policy.mode == "request" and self._busy():
            return Ended([], [])
        sequences, self._ended = self._ended, []
        jobs = [job for job in dict.fromkeys(sequence.job for sequence in sequences) if job.done]
        for job in jobs:
            self._forget(job)
        return Ended(sequences, jobs)

    def end(self, job: Job, state: State) -> None:
        """Stop a request as cancelled or failed, wherever its sequences are; it is no longer live.

        What a failed one has computed is not trusted to others.
        """
        for sequence in job.sequences:
            if sequence.state in (State.RUNNING, State.SWAPPED):
                self._space.release(sequence, keep=state is State.CANCELLED)
            if not sequence.state.terminal:
                self._enter(sequence, state)
        self._ended = [sequence for sequence in self._ended if sequence.job is not job]
        self._forget(job)

    def _generate(self, ones: list[Chunk]) -> tuple[bool, list[Sequence]]:
        """Chunks for running sequences that have one token to compute; those that have more.

        False if someone was preempted for them.
        """
        before = self.preemptions
        reading: list[Sequence] = []
        at = 0
        while at < len(self._running):  # which gets shorter at its end when memory is short
            sequence = self._running[at]
            length = len(sequence.tokens)
            if length - sequence.computed > 1:
                reading.append(sequence)  # it has had memory for all its tokens since it was admitted
            elif self._space.grow(sequence, length) or self._make_room(sequence, length):
                ones.append(Chunk(sequence, length - 1, 1, (sequence, *sequence.forks)))
            at += 1
        return self.preemptions == before, reading

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Let a sequence grow at the cost of the last ones; False if it was the last itself, and is preempted."""
        while True:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
            if self._space.grow(sequence, length):
                return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        if self._policy.preemption == "swap" and self._space.swap_out(sequence):
            self._enter(sequence, State.SWAPPED)
        else:
            self._space.release(sequence, keep=True)
            self._enter(sequence, State.PREEMPTED)

    def _admitted(self, now: float, started: list[Job]) -> Iterator[Sequence]:
        """Give memory to those that wait, one after another, while there is any."""
        seats = self._policy.max_running - sum(1 + len(sequence.forks) for sequence in self._running)
        if not seats:
            return
        for sequence in self._next(now):
            seats -= 1 + len(sequence.forks)
            if seats < 0:
                return
            admit = self._space.swap_in if sequence.state is State.SWAPPED else self._space.admit
            if not admit(sequence, not self._running):
                self._first = sequence
                return
            if sequence.state is State.WAITING:
                self._start(sequence, now, started)
            self._enter(sequence, State.RUNNING)
            yield sequence

    def _next(self, now: float) -> Iterator[Sequence]:
        """Those without memory, in the order of admission: the preempted first."""
        joinable = self._policy.mode == "continuous" or not self._busy()
        yield from list(self._queues[State.SWAPPED])
        yield from list(self._queues[State.PREEMPTED])
        if not joinable:
            return
        if self._first is not None and self._first.state is State.WAITING:
            yield self._first
        waiting = list(self._queues[State.WAITING])
        if self._policy.order == "fcfs":
            yield from waiting
            return
        aged = iter(waiting[: bisect.bisect_right(waiting, now - self._policy.ageing_s, key=_urgency)])
        known = sorted(waiting[:LOOKAHEAD], key=self._space.cached, reverse=True)  # stable: ties by turn
        ranked = itertools.chain(known, waiting[LOOKAHEAD:])
        for _ in waiting:
            order = (aged, ranked) if self._admissions % AGED_SHARE == 0 else (ranked, aged)
            yield next(one for one in itertools.chain(*order) if one.state is State.WAITING)

    def _start(self, sequence: Sequence, now: float, started: list[Job]) -> None:
        sequence.cached = sequence.computed
        self._admissions += 1
        self.prompt_tokens += len(sequence.tokens)
        self.cached_tokens += sequence.computed
        if sequence.job.started is None:
            sequence.job.started = now
            started.append(sequence.job)

    def _fork(self, sequence: Sequence) -> None:
        for fork in sequence.forks:
            self._space.fork(sequence, fork)
            fork.cached = sequence.cached
            self._enter(fork, State.RUNNING)
        sequence.forks = []

    def _give(self, sequence: Sequence, token: int) -> None:
        sequence.tokens.append(token)
        self.generated_tokens += 1
        params = sequence.request.params
        if token in self._eos and not params.ignore_eos:
            self._end(sequence, "stop")
        elif sequence.generated == params.max_tokens:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, reason: Reason) -> None:
        self._space.release(sequence, keep=True)
        self._enter(sequence, State.ENDED)
        sequence.reason = reason
        self._ended.append(sequence)

    def _busy(self) -> bool:
        return bool(self._running or self._queues[State.SWAPPED] or self._queues[State.PREEMPTED])

    def _enter(self, sequence: Sequence, state: State) -> None:
        """Move a sequence from the queue of its state to that of another; not every state has one."""
        old, new = self._queues.get(sequence.state), self._queues.get(state)
        if old is not None:
            del old[bisect.bisect_left(old, sequence.turn, key=_turn)]
        if new is not None:
            bisect.insort(new, sequence, key=_turn)
        sequence.state = state

    def _forget(self, job: Job) -> None:
        del self.jobs[job.request.id]
        if job.request.deadline_s is not None:
            self._deadlines.remove(job)


def _chunk(sequence: Sequence, count: int) -> Chunk:
    done = sequence.computed + count == len(sequence.tokens)
    return Chunk(sequence, sequence.computed, count, (sequence, *sequence.forks) if done else ())


def _turn(sequence: Sequence) -> Turn:
    return sequence.turn


def _urgency(sequence: Sequence) -> float:
    return sequence.turn[0]


def _deadline(job: Job) -> float:
    assert job.request.deadline_s is not None
    return job.arrived + job.request.deadline_s
