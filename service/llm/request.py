"""A request for text, the sequences that answer it, and what the engine says about them. No torch.

    waiting --admit--> running --schedule, commit--> ended
       |              /   |   \
       |     preempted    |    swapped     (both go back to running before anyone new is admitted)
       |                  |
       +---- forking: the other choices of a request stand here until the first one's prompt has been read
       |
       +--> failed, cancelled, from anywhere above
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from service import events
from service.errors import invalid
from service.events import MAX_SEED, Cancelled, Failed, Started

if TYPE_CHECKING:
    from cache.prefix.radix import Node

MAX_CHOICES = 128
MAX_LOGPROBS = 20

Reason = Literal["stop", "length"]
Turn = tuple[float, int, int]


class State(enum.StrEnum):
    WAITING = "waiting"  # never had memory
    FORKING = "forking"  # starts with the tokens and pages of the request's first choice, once its prompt is read
    RUNNING = "running"
    PREEMPTED = "preempted"  # its memory was taken; it is computed again
    SWAPPED = "swapped"  # its memory was taken; its pages are on the host
    ENDED = "ended"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (State.ENDED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a choice ends. Raises InputError, naming the field, for what is out of range."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # 1: none
    stop: tuple[str, ...] = ()
    max_tokens: int = 256  # new tokens of each choice
    seed: int = 0  # choice i uses seed + i (modulo 2**32)
    logprobs: int | None = None  # alternatives told with each token; None: no log-probabilities at all
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise invalid("temperature", self.temperature, "a number from 0 to 2")
        if self.top_k < 0:
            raise invalid("top_k", self.top_k, "0 for all tokens, or how many to draw from")
        if not 0 < self.top_p <= 1:
            raise invalid("top_p", self.top_p, "a number above 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise invalid("min_p", self.min_p, "a number from 0 to 1")
        if not 0 < self.repetition_penalty <= 10:
            raise invalid("repetition_penalty", self.repetition_penalty, "a number above 0, at most 10")
        if not all(self.stop):
            raise invalid("stop", self.stop, "strings of at least one character")
        if self.max_tokens < 1:
            raise invalid("max_tokens", self.max_tokens, "at least 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise invalid("seed", self.seed, f"a whole number from 0 to {MAX_SEED}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise invalid("logprobs", self.logprobs, f"a whole number from 0 to {MAX_LOGPROBS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmRequest:
    """A prompt of token ids and what is asked of it. Raises InputError as `SamplingParams`."""

    id: str
    tokens: tuple[int, ...] = field(repr=False)
    params: SamplingParams
    n: int = 1  # choices
    salt: str = ""  # whose cached prefixes it shares: requests of different salts never share any
    priority: int = 0  # higher starts earlier; -10 to 10
    deadline_s: float | None = None  # seconds from arrival; None: no deadline

    def __post_init__(self) -> None:
        if not self.tokens:
            raise invalid("tokens", self.tokens, "at least one token")
        if not 1 <= self.n <= MAX_CHOICES:
            raise invalid("n", self.n, f"a whole number from 1 to {MAX_CHOICES}")
        if not -10 <= self.priority <= 10:
            raise invalid("priority", self.priority, "a whole number from -10 to 10")
        if self.deadline_s is not None and not (math.isfinite(self.deadline_s) and self.deadline_s > 0):
            raise invalid("deadline_s", self.deadline_s, "a number of seconds above 0")


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request: its tokens, and the memory that their keys and values are in.

    The scheduler and its KV space alone change it.

        tokens    |-- prompt --|-- generated --|
        computed  |-- in memory --|............|    all but the last token, while it generates
        pages     |----|----|----|                  cover `computed`, and what the current batch computes
    """

    job: Job
    index: int  # number of the choice
    seed: int
    turn: Turn  # earlier is more urgent, and preempted later
    tokens: list[int]
    state: State
    computed: int = 0
    forks: list[Sequence] = field(default_factory=list)  # choices that start once this one's prompt is read
    pages: list[int] = field(default_factory=list)  # row of the page table, in a paged space
    slot: int = -1  # in a virtual space
    places: list[int] = field(default_factory=list)  # host places of its pages, while swapped
    node: Node | None = None  # of the prefix tree, locked for it
    cached: int = 0  # tokens of the prompt that were found in memory when it first started
    reason: Reason | None = None  # why it ended

    @property
    def request(self) -> LlmRequest:
        return self.job.request

    @property
    def generated(self) -> int:
        """How many tokens it has been given."""
        return len(self.tokens) - len(self.job.request.tokens)


@dataclass(slots=True, eq=False)
class Job:
    """A request that is not terminal yet. Times in seconds of the scheduler's clock."""

    request: LlmRequest
    arrived: float
    sequences: list[Sequence] = field(default_factory=list)
    started: float | None = None  # when it was first given memory

    @property
    def usage(self) -> Usage:
        prompt = len(self.request.tokens)
        generated = sum(sequence.generated for sequence in self.sequences)
        return Usage(prompt, generated, self.sequences[0].cached)

    @property
    def done(self) -> bool:
        return all(sequence.state is State.ENDED for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. `cached` of the prompt's were not computed again."""

    prompt: int
    completion: int
    cached: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings(events.Timings):
    """Seconds. `first_token_s` counts from arrival."""

    first_token_s: float = 0.0


# What engine.step() returns, in order, beside Started, Failed and Cancelled (service.events).


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability, and the most likely ones' as (token, logprob), if they were asked for."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of a choice, and the text that they complete, which may be empty or belong to tokens before."""

    request_id: str
    choice: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    text: str = ""

    def merged(self, earlier: events.Event) -> Delta | None:
        """Both, where a reader is slower than the model: what waits for it is one Delta a choice."""
        if not isinstance(earlier, Delta) or earlier.choice != self.choice:
            return None
        logprobs = None if self.logprobs is None else (earlier.logprobs or ()) + self.logprobs
        tokens, text = earlier.tokens + self.tokens, earlier.text + self.text
        return Delta(self.request_id, self.choice, tokens, logprobs, text)


@dataclass(frozen=True, slots=True)
class ChoiceEnded:
    request_id: str
    choice: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Completed(events.Completed):
    timings: Timings
    usage: Usage


Event = Started | Delta | ChoiceEnded | Completed | Failed | Cancelled
