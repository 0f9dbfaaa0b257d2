"""A request for text through the engine: accepted, read choice by choice, cancelled as soon as the client leaves."""

from __future__ import annotations

import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from service.api.live import live
from service.api.middleware import tenant_of
from service.api.state import Service, refusals
from service.api.text_schemas import TextBody
from service.bridge import RequestStream
from service.errors import InputError, NotFoundError, invalid, renamed
from service.events import MAX_SEED, Event
from service.llm.request import ChoiceEnded, Completed, Delta, LlmRequest, TokenLogprob, Usage

if TYPE_CHECKING:  # importing it loads torch, and the port answers before that
    from service.writer import Writer


@dataclass(frozen=True, slots=True)
class Task:
    """An accepted request."""

    request: LlmRequest
    writer: Writer
    created: int  # Unix time

    @property
    def model(self) -> str:
        return self.writer.card.name

    def shown(self, delta: Delta) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the tokens that are text: all but a mark of the end."""
        ends = self.writer.tokenizer.stop_tokens
        return tuple(token for token in delta.logprobs or () if token.token not in ends)


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has come."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None


async def accept(
    service: Service, client: Request, body: TextBody, tokens: tuple[int, ...]
) -> tuple[Task, RequestStream]:
    """What the body asks for, checked and handed to the engine.

    Args:
        tokens: of the prompt.

    Raises:
        InputError: in the names of the body's fields.
        BusyError: the queue is full.
        UnavailableError: no requests are taken.
    """
    writer, runtime = service.writer, service.runtime
    try:
        params = body.params(writer.longest - len(tokens), secrets.randbelow(MAX_SEED + 1))
        request = LlmRequest(
            id=uuid.uuid4().hex,
            tokens=tokens,
            params=params,
            n=body.n or 1,
            salt=runtime.namespace(tenant_of(client)),
            priority=body.priority or 0,
            deadline_s=body.deadline_s,
        )
        writer.check(request)
    except InputError as error:
        raise renamed(error, body.names) from None
    with refusals(service.metrics.text_ended):
        stream = writer.bridge.submit(request)
    return Task(request, writer, int(time.time())), stream


def check_model(service: Service, body: TextBody) -> Writer:
    """The writer of the model that is asked for.

    Raises:
        NotFoundError: it is not served.
        UnavailableError: none is.
    """
    writer = service.writer
    if body.model not in (None, writer.card.name):
        message = f"model: {body.model!r} writes no text here; {writer.card.name} does"
        raise NotFoundError(message, param="model", code="model_not_found")
    return writer


def known_tokens(writer: Writer, tokens: list[int]) -> tuple[int, ...]:
    """Raises InputError for a prompt of token ids with one that the model does not have, or with none."""
    size = writer.tokenizer.vocab_size
    if not tokens:
        raise invalid("prompt", tokens, "at least one token")
    for token in tokens:
        if not 0 <= token < size:
            raise invalid("prompt", token, f"token ids from 0 to {size - 1}")
    return tuple(tokens)


@contextlib.asynccontextmanager
async def events_of(service: Service, client: Request, stream: RequestStream) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of an answer, counted; see `live`."""
    async with live(service, client, stream, service.metrics.text_ended) as events:
        yield events


async def write(service: Service, client: Request, task: Task, stream: RequestStream) -> tuple[list[Choice], Completed]:
    """All answers to a request, in order, and its last event. Raises the HeadstartError that ended it."""
    choices = [Choice(index) for index in range(task.request.n)]
    completed: Completed | None = None
    async with events_of(service, client, stream) as events:
        async for event in events:
            if isinstance(event, Delta):
                choices[event.choice].text += event.text
                choices[event.choice].logprobs += task.shown(event)
            elif isinstance(event, ChoiceEnded):
                choices[event.choice].reason = event.reason
            elif isinstance(event, Completed):
                completed = event
    assert completed is not None  # any other end was raised
    return choices, completed


def usage_of(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.total,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
