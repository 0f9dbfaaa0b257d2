"""The bodies of requests for text: OpenAI's fields, and those of Headstart that its clients can send along.

Types are checked here, ranges by `service.llm.request` and by the engine, which knows how long a text may be.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from service.api.schemas import Body
from service.errors import invalid
from service.events import MAX_SEED
from service.llm.request import MAX_CHOICES, MAX_LOGPROBS, SamplingParams

ROLES = "system, developer, user or assistant"
COMPLETION_TOKENS = 16  # of /v1/completions where nothing is said, as OpenAI's
MAX_STOPS = 16


def _joined(value: Any) -> Any:
    """The text parts of a message's content as one text."""
    if not isinstance(value, list) or not value:
        return value
    texts = []
    for part in value:
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            return value
        texts.append(part["text"])
    return "".join(texts) if all(isinstance(text, str) for text in texts) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _text_or_tokens(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value)):
        return value
    raise ValueError("neither text nor token ids")


class MessageBody(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[dict[str, str]])]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        """For a chat template; models know what OpenAI calls developers as the system."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptionsBody(Body):
    include_usage: bool = False


class TextBody(Body):
    """What both endpoints take."""

    model: Annotated[str | None, Field(description="the language model that GET /v1/models lists")] = None
    max_tokens: Annotated[int | None, Field(description="an integer, at least 1, as many as fit in the context")] = None
    n: Annotated[
        int | None, Field(ge=1, le=MAX_CHOICES, description=f"an integer, 1 to {MAX_CHOICES}, how many answers")
    ] = None
    temperature: Annotated[float | None, Field(description="a number, 0 (the likeliest) to 2")] = None
    top_p: Annotated[float | None, Field(description="a number above 0, at most 1")] = None
    top_k: Annotated[int | None, Field(description="an integer, 0 for all tokens")] = None
    min_p: Annotated[float | None, Field(description="a number, 0 to 1")] = None
    repetition_penalty: Annotated[float | None, Field(description="a number above 0, at most 10; 1 for none")] = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=0, description="0; see repetition_penalty")] = None
    presence_penalty: Annotated[float | None, Field(ge=0, le=0, description="0; see repetition_penalty")] = None
    stop: Annotated[
        list[str] | None,
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
        Field(max_length=MAX_STOPS, description=f"text, or a list of at most {MAX_STOPS} texts"),
    ] = None
    seed: Annotated[
        int | None, Field(ge=-1, le=MAX_SEED, description=f"an integer, 0 to {MAX_SEED}, or -1 for a random one")
    ] = None
    stream: Annotated[bool | None, Field(description="true or false")] = None
    stream_options: Annotated[
        StreamOptionsBody | None, Field(description='{"include_usage": true or false}, of a streamed reply')
    ] = None
    priority: Annotated[int | None, Field(description="an integer, -10 to 10; higher starts earlier")] = None
    deadline_s: Annotated[float | None, Field(description="a number of seconds above 0")] = None
    user: Annotated[str | None, Field(description="text that names the end user; taken and not kept")] = None

    @property
    def names(self) -> dict[str, str]:
        """What this body calls the engine's fields, where that is not their name."""
        return {"tokens": "prompt"}

    @property
    def include_usage(self) -> bool:
        """Raises InputError for options of a stream where there is none."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise invalid("stream_options", self.stream_options.model_dump(), "left out unless stream is true")
        return self.stream_options.include_usage

    @property
    def most(self) -> int | None:
        """Tokens of an answer; None: as many as fit."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Likely tokens told beside each; None: no log-probabilities at all."""
        raise NotImplementedError

    def params(self, room: int, seed: int) -> SamplingParams:
        """How to draw tokens.

        Args:
            room: tokens that are left in the context for an answer.
            seed: where none is asked for.

        Raises:
            InputError: in the engine's names.
        """
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            stop=tuple(self.stop or ()),
            max_tokens=max(1, room) if self.most is None else self.most,
            seed=seed if self.seed in (None, -1) else self.seed,
            logprobs=self.alternatives,
        )


class ChatBody(TextBody):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[MessageBody],
        Field(min_length=1, description=f'a list of one or more {{"role": {ROLES}, "content": text}}'),
    ]
    max_completion_tokens: Annotated[int | None, Field(description="as max_tokens, OpenAI's newer name")] = None
    logprobs: Annotated[bool | None, Field(description="true or false")] = None
    top_logprobs: Annotated[int | None, Field(description=f"an integer, 0 to {MAX_LOGPROBS}, with logprobs true")] = (
        None
    )

    @property
    def names(self) -> dict[str, str]:
        newer = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return {"prompt": "messages", "tokens": "messages", "logprobs": "top_logprobs"} | newer

    @property
    def most(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            told = f"the same as max_tokens, {self.max_tokens}, or one of them left out"
            raise invalid("max_tokens", self.max_completion_tokens, told)  # as max_completion_tokens
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("logprobs", self.top_logprobs, "left out unless logprobs is true")  # as top_logprobs
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(TextBody):
    """POST /v1/completions."""

    prompt: Annotated[
        str | list[int], BeforeValidator(_text_or_tokens), Field(description="text, or a list of token ids")
    ]
    logprobs: Annotated[int | None, Field(description=f"an integer, 0 to {MAX_LOGPROBS}")] = None
    echo: Annotated[Literal[False] | None, Field(description="false")] = None

    @property
    def most(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class RewriteBody(Body):
    """POST /rewrite."""

    prompt: Annotated[str, Field(description="text of 1 to 2000 characters")]
