"""Iteration-level batching of text (Orca, Yu et al. 2022): requests join and leave at every pass through the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.errors import DeadlineError, HeadstartError
from service.events import Cancelled, Failed, Started
from service.llm.request import ChoiceEnded, Completed, Delta, Event, Job, LlmRequest, Sequence, State, Timings
from service.llm.runner import Outcome, Runner
from service.llm.scheduler import Batch, Scheduler
from service.llm.text import ChoiceText, Detokenizer


class Observer(Protocol):
    """What the engine reports as it goes; called from its thread."""

    def batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """One pass computed so many tokens of so many sequences."""
        ...


class NullObserver:
    def batch(self, sequences: int, tokens: int, seconds: float) -> None: ...


@dataclass(slots=True)
class _Answer:
    """What has become of a live request so far, beside its sequences."""

    texts: list[ChoiceText]  # of its choices
    first_token: float | None = None  # when it came


class LlmEngine:
    """Writes text. Not thread-safe: one thread calls every method.

    Every added request gets Started at most once, then its Delta and ChoiceEnded events, and exactly one of Completed,
    Failed, Cancelled.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        detokenizer: Callable[[], Detokenizer],
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._detokenizer = detokenizer
        self.observer: Observer = observer or NullObserver()
        self._clock = clock
        self._events: list[Event] = []
        self._answers: dict[Job, _Answer] = {}  # of live requests

    def add(self, request: LlmRequest) -> None:
        """Queue a request.

        Raises:
            InputError: it could never run: it is longer than the model or the memory allows.
        """
        job = self._scheduler.add(request, self._clock())
        texts = [ChoiceText(self._detokenizer(), request.params.stop) for _ in job.sequences]
        self._answers[job] = _Answer(texts)

    def abort(self, request_id: str) -> None:
        """Cancel a request: its memory is free at once, its Cancelled comes with the next step. No error if unknown."""
        job = self._scheduler.jobs.get(request_id)
        if job is not None:
            self._events.append(Cancelled(request_id, self._end(job, State.CANCELLED)))

    def has_work(self) -> bool:
        return bool(self._scheduler.jobs or self._events)

    def fail_all(self, error: HeadstartError) -> list[Event]:
        """End every live request with this error."""
        for job in list(self._scheduler.jobs.values()):
            self._fail(job, error)
        return self._drain()

    def step(self) -> list[Event]:
        """Choose a batch, compute it, give its sequences their tokens; what happened, in order."""
        self._expire()
        batch = self._scheduler.schedule(self._clock())
        if batch is not None:
            outcomes = self._run(batch)
            self._commit(batch, outcomes)
            self._tell(outcomes)
        self._collect()
        return self._drain()

    def _expire(self) -> None:
        for job in self._scheduler.expired(self._clock()):
            message = f"deadline_s: not done within {job.request.deadline_s:g} s"
            self._fail(job, DeadlineError(message, param="deadline_s"))

    def _run(self, batch: Batch) -> list[Outcome]:
        self._events += [Started(job.request.id) for job in batch.started]
        begun = self._clock()
        outcomes = self._runner.run(batch)
        self.observer.batch(len(batch.chunks), batch.tokens, self._clock() - begun)
        return outcomes

    def _commit(self, batch: Batch, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.error is not None and outcome.chunk.sequence.job in self._answers:
                self._fail(outcome.chunk.sequence.job, outcome.error)
        # The scheduler passes over the sequences of requests that have just failed, whatever their tokens.
        self._scheduler.commit(batch, [draw.token for outcome in outcomes for draw in outcome.draws])

    def _tell(self, outcomes: list[Outcome]) -> None:
        """Turn new tokens into text, and end choices in which a stop string has come."""
        now = self._clock()
        for outcome in outcomes:
            for sequence, draw in zip(outcome.chunk.outputs, outcome.draws, strict=True):
                answer = self._answers.get(sequence.job)
                if answer is None:
                    continue
                if answer.first_token is None:
                    answer.first_token = now
                text = self._text(answer.texts[sequence.index], sequence, draw.token)
                logprobs = None if sequence.request.params.logprobs is None else (draw,)
                self._events.append(Delta(sequence.request.id, sequence.index, (draw.token,), logprobs, text))

    def _text(self, text: ChoiceText, sequence: Sequence, token: int) -> str:
        """What a token adds to the text of its choice; the rest of the text with the last one."""
        ended = sequence.state is State.ENDED
        if ended and sequence.reason == "stop":  # the token is a mark of the end
            return text.finish()
        new = text.add(token)
        if text.stopped:
            self._scheduler.finish(sequence, "stop")
        return new + text.finish() if ended else new

    def _collect(self) -> None:
        ended = self._scheduler.collect()
        for sequence in ended.sequences:
            assert sequence.reason is not None  # it has ended
            self._events.append(ChoiceEnded(sequence.request.id, sequence.index, sequence.reason))
        for job in ended.jobs:
            self._events.append(Completed(job.request.id, self._timings(job), job.usage))
            del self._answers[job]

    def _fail(self, job: Job, error: HeadstartError) -> None:
        self._events.append(Failed(job.request.id, error, self._end(job, State.FAILED)))

    def _end(self, job: Job, state: State) -> Timings:
        timings = self._timings(job)
        self._scheduler.end(job, state)
        del self._answers[job]
        return timings

    def _timings(self, job: Job) -> Timings:
        now, first = self._clock(), self._answers[job].first_token
        started = now if job.started is None else job.started
        return Timings(
            queue_s=started - job.arrived,
            first_token_s=0.0 if first is None else first - job.arrived,
            total_s=now - job.arrived,
        )

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events
