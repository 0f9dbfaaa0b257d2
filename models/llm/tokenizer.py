"""Text to tokens and back: plain prompts, chats through the model's own template, and text as it is generated."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from models.diffusion.folder import one_line, read_json
from models.errors import ModelError, PromptError

PRIVATE = 0x10F000  # where characters begin, in Unicode's last private plane, that stand for special tokens in a text
HIDDEN = re.compile("([\U0010f000-\U0010fffd])")
HALF = "\ufffd"  # what a decoder makes of bytes that are not a character, or not yet


class Tokenizer:
    """Any tokenizer of the `tokenizers` library, with its chat template.

    Args:
        stop_tokens: ids that end a text.
        chat_template: in Jinja2; None: the model has none.
        names: what a template may ask for: bos_token, eos_token, ...

    Raises:
        ModelError: the template is not Jinja2.
    """

    def __init__(
        self,
        backend: Backend,
        stop_tokens: frozenset[int] = frozenset(),
        chat_template: str | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.stop_tokens = stop_tokens
        self._backend = backend
        self._names = dict(names or {})
        added = backend.get_added_tokens_decoder().values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._hidden = {token: chr(PRIVATE + index) for index, token in enumerate(special)}
        self._shown = {character: token for token, character in self._hidden.items()}
        try:
            self._template = None if chat_template is None else _environment().from_string(chat_template)
        except TemplateSyntaxError as error:
            raise ModelError(f"the chat template is wrong at line {error.lineno}: {one_line(error)}") from None

    @property
    def has_chat(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with what the model wants before it. Special tokens written in it are special."""
        return list(self._backend.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=True))

    def spell(self, token: int) -> str:
        """One token by itself, special ones by name; bytes that are no whole character are U+FFFD."""
        return str(self._backend.decode([token], skip_special_tokens=False))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the assistant speaks next.

        What a message's content says is text, also where it looks like a special token: no one ends another's turn.

        Args:
            messages: each with `role` and `content`.

        Raises:
            PromptError: the model has no chat template, or its template refuses these messages.
        """
        hidden = [{**message, "content": self._hide(message["content"])} for message in messages]
        plain, *rest = HIDDEN.split(self.render_chat(hidden))
        tokens = self._ids(plain)
        for character, plain in zip(rest[::2], rest[1::2], strict=True):
            text = self._shown.get(character, character)
            # Cut after its first character, so that neither part is the special token itself.
            tokens += self._ids(text[:1]) + self._ids(text[1:]) + self._ids(plain)
        return tokens

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as the model's template writes it; PromptError as encode_chat."""
        if self._template is None:
            raise PromptError("this model has no chat template; it completes plain prompts only")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._names)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise PromptError(f"the model's chat template refuses these messages: {one_line(error)}") from None

    def _hide(self, content: str) -> str:
        """Put a private character for every special token in a text, the longest first."""
        for token, character in self._hidden.items():
            content = content.replace(token, character)
        return content

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids) if text else []


class Detokenizer:
    """Text of one choice as its tokens come.

    Whether a token starts with a space, and which bytes make a character, shows only beside the tokens before it: a
    window of them is decoded with each new one. The window moves on whenever it ends with a whole character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._old = 0  # tokens of the window that only give context
        self._told = 0  # characters of the window's text that were given out

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain now. Bytes of a character that is not whole yet are kept back."""
        self._window += tokens
        text = self._tokenizer.decode(self._window)
        new = text.rstrip(HALF)[self._told :]
        self._told += len(new)
        if new and not text.endswith(HALF):
            self._window = self._window[self._old :]
            self._old = len(self._window)
            self._told = len(self._tokenizer.decode(self._window))
        return new

    def finish(self) -> str:
        """What was kept back, at the end of the text."""
        return self._tokenizer.decode(self._window)[self._told :]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a model's folder: tokenizer.json, and tokenizer_config.json, chat_template.jinja and the tokens that end a
    text where they are there.

    Raises:
        ModelError: a file is missing, damaged, or names a token that there is not.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path} is missing")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} is not a tokenizer: {one_line(error)}") from None
    backend.no_padding()
    backend.no_truncation()
    config = _optional(folder / "tokenizer_config.json")
    names = {key: _text(value) for key, value in config.items() if key.endswith("_token") and value}
    template = _template(config.get("chat_template"))
    if (jinja := folder / "chat_template.jinja").is_file():
        template = jinja.read_text(encoding="utf-8")
    stops = _stop_tokens(folder, backend, names.get("eos_token"))
    try:
        return Tokenizer(backend, stops, template, names)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None


def _stop_tokens(folder: Path, backend: Backend, eos: str | None) -> frozenset[int]:
    """Of generation_config.json, config.json and the tokenizer: models name some of theirs in one of them only."""
    stops: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ids = _optional(folder / name).get("eos_token_id")
        stops.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if eos is not None and (index := backend.token_to_id(eos)) is not None:
        stops.add(index)
    unknown = sorted(index for index in stops if backend.id_to_token(index) is None)
    if unknown:
        raise ModelError(f"{folder}: eos_token_id names {unknown}, which its tokenizer does not have")
    return frozenset(stops)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _template(value: Any) -> str | None:
    """A template, or the one called "default" of several."""
    if isinstance(value, list):
        return next((str(entry["template"]) for entry in value if entry.get("name") == "default"), None)
    return None if value is None else str(value)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: transformers' settings and functions. A template is code from a file that came
    from elsewhere, so it runs in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)
