"""POST /v1/chat/completions and /v1/completions: OpenAI's shapes, for clients that exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.bodies import read_body
from service.api.events import DataStream, Messages
from service.api.openapi import json_body
from service.api.state import Service, service_of
from service.api.text_schemas import ChatBody, CompletionBody
from service.api.writing import Choice, Task, accept, check_model, events_of, known_tokens, usage_of, write
from service.bridge import RequestStream
from service.llm.request import ChoiceEnded, Completed, Delta, TokenLogprob

if TYPE_CHECKING:  # importing it loads torch, and the port answers before that
    from models.llm.tokenizer import Tokenizer

router = APIRouter()
HALF = "\N{REPLACEMENT CHARACTER}"  # what stands for bytes that are no whole character
LEAST_LOGPROB = -9999.0  # JSON has no infinity


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatBody), summary="Answer a conversation, as OpenAI does")
async def chat(client: Request) -> Response:
    service = service_of(client)
    body = await read_body(client, ChatBody)
    writer = check_model(service, body)
    usage = body.include_usage
    tokens = await writer.tokens_of([message.turn() for message in body.messages])
    task, stream = await accept(service, client, body, tokens)
    if body.stream:
        return DataStream(_chat_chunks(service, client, task, stream, usage))
    choices, completed = await write(service, client, task, stream)
    told = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _chat_logprobs(task, choice.logprobs),
            "finish_reason": choice.reason,
        }
        for choice in choices
    ]
    return JSONResponse(_head(task, "chatcmpl", "chat.completion") | {"choices": told} | _tail(completed))


@router.post("/v1/completions", openapi_extra=json_body(CompletionBody), summary="Complete a text, as OpenAI does")
async def completions(client: Request) -> Response:
    service = service_of(client)
    body = await read_body(client, CompletionBody)
    writer = check_model(service, body)
    usage = body.include_usage
    prompt = body.prompt
    tokens = await writer.tokens_in(prompt) if isinstance(prompt, str) else known_tokens(writer, prompt)
    task, stream = await accept(service, client, body, tokens)
    if body.stream:
        return DataStream(_completion_chunks(service, client, task, stream, usage))
    choices, completed = await write(service, client, task, stream)
    told = [_completion(task, choice, 0) for choice in choices]
    return JSONResponse(_head(task, "cmpl", "text_completion") | {"choices": told} | _tail(completed))


async def _chat_chunks(service: Service, client: Request, task: Task, stream: RequestStream, usage: bool) -> Messages:
    head = _head(task, "chatcmpl", "chat.completion.chunk") | ({"usage": None} if usage else {})

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice]}

    for index in range(task.request.n):
        yield "", chunk(index, {"role": "assistant", "content": ""})
    async with events_of(service, client, stream) as events:
        async for event in events:
            if isinstance(event, Delta):
                logprobs = task.shown(event)
                if event.text or logprobs:
                    yield "", chunk(event.choice, {"content": event.text}, _chat_logprobs(task, logprobs))
            elif isinstance(event, ChoiceEnded):
                yield "", chunk(event.choice, {}, None, event.reason)
            elif isinstance(event, Completed) and usage:
                yield "", head | {"choices": []} | _tail(event)


async def _completion_chunks(
    service: Service, client: Request, task: Task, stream: RequestStream, usage: bool
) -> Messages:
    head = _head(task, "cmpl", "text_completion") | ({"usage": None} if usage else {})
    told = [0] * task.request.n  # characters
    async with events_of(service, client, stream) as events:
        async for event in events:
            if isinstance(event, Delta):
                part = Choice(event.choice, event.text, list(task.shown(event)))
                if part.text or part.logprobs:
                    yield "", head | {"choices": [_completion(task, part, told[event.choice])]}
                    told[event.choice] += len(event.text)
            elif isinstance(event, ChoiceEnded):
                end = Choice(event.choice, reason=event.reason)
                yield "", head | {"choices": [_completion(task, end, told[event.choice])]}
            elif isinstance(event, Completed) and usage:
                yield "", head | {"choices": []} | _tail(event)


def _head(task: Task, prefix: str, kind: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{task.request.id}", "object": kind, "created": task.created, "model": task.model}


def _tail(completed: Completed) -> dict[str, Any]:
    return {"usage": usage_of(completed.usage), "timings": asdict(completed.timings)}


def _completion(task: Task, choice: Choice, offset: int) -> dict[str, Any]:
    """One choice of a completion, whose text begins at an offset of the whole answer."""
    logprobs: dict[str, Any] | None = None
    if task.request.params.logprobs is not None and (choice.logprobs or choice.reason is None):
        spell = task.writer.tokenizer.spell
        tokens = [spell(each.token) for each in choice.logprobs]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [_finite(each.logprob) for each in choice.logprobs],
            "top_logprobs": [{spell(token): _finite(value) for token, value in each.top} for each in choice.logprobs],
            "text_offset": [offset + sum(map(len, tokens[:at])) for at in range(len(tokens))],
        }
    return {"index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.reason}


def _chat_logprobs(task: Task, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if task.request.params.logprobs is None:
        return None
    tokenizer = task.writer.tokenizer
    entries = [
        _entry(tokenizer, each.token, each.logprob)
        | {"top_logprobs": [_entry(tokenizer, token, value) for token, value in each.top]}
        for each in logprobs
    ]
    return {"content": entries, "refusal": None}


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.spell(token)
    return {"token": text, "logprob": _finite(logprob), "bytes": None if HALF in text else list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
