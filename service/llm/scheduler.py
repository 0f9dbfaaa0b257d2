"""Which tokens are computed next. Knows no torch, and is the only code that changes a sequence's state.

An engine's step is

    batch = scheduler.schedule(now)           # None: nothing to do; batch.started are new
    tokens = run(batch)                       # one for each of batch.outputs
    scheduler.commit(batch, tokens)           # ends choices by length and by end-of-sequence tokens
    scheduler.finish(sequence, "stop")        # for those whose text holds a stop string
    scheduler.collect()                       # choices that have ended and may be told of; job.done: the request's last

with `add(request, now) -> Job`, `end(job, State.CANCELLED)`, `expired(now) -> list[Job]` and `jobs` between steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from service.llm.request import Job, Sequence
from service.llm.spaces import Moves


class Chunk(NamedTuple):
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
