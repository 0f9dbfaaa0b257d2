"""From a prompt as people type it to a caption that the image model draws well, or back to the prompt.

    prompt -> messages -> text model -> caption -> guards -> Rewrite

The prompt itself is used wherever the caption cannot be trusted: a rewrite never fails a generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from models.rewriter.subjects import Vocabulary
from models.rewriter.template import MAX_LENGTH, MAX_TOKENS, Message, caption_of, messages, one_line
from service.errors import HeadstartError

__all__ = ["CPU_BUDGET_S", "GPU_BUDGET_S", "Outcome", "Rewrite", "Rewriter", "TextModel"]

log = logging.getLogger(__name__)

CPU_BUDGET_S, GPU_BUDGET_S = 2.0, 0.15

Outcome = Literal["rewritten", "unchanged", "guarded", "timed_out", "failed", "unavailable"]


class TextModel(Protocol):
    """What the rewriter asks of a language model."""

    def answer(self, messages: Sequence[Message], max_tokens: int) -> AsyncGenerator[str, None]:
        """The most likely answer to a conversation, piece by piece. Closing the generator cancels the request."""
        ...


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What became of a prompt.

    prompt: to draw from; the original unless the outcome is "rewritten".
    outcome: "unchanged": the model had nothing to change. "guarded": its caption was refused. "timed_out": it was not
        done in time. "failed": it could not answer. "unavailable": there is none.
    reason: why the original is used, in a few words; "" for "rewritten" and "unchanged".
    seconds: that it took.
    """

    prompt: str
    original: str
    outcome: Outcome
    reason: str
    seconds: float

    @property
    def facts(self) -> dict[str, str]:
        """What a caller is told of it beside the prompt."""
        return {"outcome": self.outcome, "reason": self.reason}


class Rewriter:
    """Rewrites prompts with a text model.

    Args:
        vocabulary: finds the subjects of prompts and captions.
        fits: whether the image model reads all of a caption.
        budget_s: after so many seconds the original is used.
    """

    def __init__(
        self,
        model: TextModel,
        vocabulary: Vocabulary,
        fits: Callable[[str], bool],
        budget_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._vocabulary, self._fits = model, vocabulary, fits
        self._budget_s, self._clock = budget_s, clock

    async def rewrite(self, prompt: str) -> Rewrite:
        """The prompt rewritten, or why it was not. Raises only asyncio.CancelledError, if it is cancelled."""
        begun = self._clock()
        caption, reason = "", ""
        outcome: Outcome = "failed"
        try:
            async with asyncio.timeout(self._budget_s):
                caption = caption_of(await self._ask(prompt))
        except TimeoutError:
            outcome, reason = "timed_out", f"no caption within {self._budget_s:g} s"
        except HeadstartError as error:
            reason = error.message
        except Exception:
            log.exception("rewriting a prompt failed")
            reason = "the language model failed"
        else:
            outcome, reason = self._judged(prompt, caption)
        chosen = caption if outcome == "rewritten" else prompt
        return Rewrite(chosen, prompt, outcome, reason, self._clock() - begun)

    async def _ask(self, prompt: str) -> str:
        """The answer's first line with words, which is all that is read; the request ends with this call."""
        answer = ""
        async with contextlib.aclosing(self._model.answer(messages(prompt), MAX_TOKENS)) as pieces:
            async for piece in pieces:
                answer = (answer + piece).lstrip()
                if "\n" in answer or len(answer) > MAX_LENGTH:
                    break
        return answer

    def _judged(self, prompt: str, caption: str) -> tuple[Outcome, str]:
        """Whether the caption may stand for the prompt, and if not, why."""
        if not caption:
            return "guarded", "the caption is empty"
        if caption.casefold() == one_line(prompt).casefold():
            return "unchanged", ""
        if not self._fits(caption):
            return "guarded", "the caption is longer than the image model reads"
        if lost := self._missing(prompt, caption):
            return "guarded", f"the caption has lost {lost!r}"
        # A prompt with a word that is not known may well mean what it does not name.
        if self._vocabulary.understands(prompt) and (made_up := self._missing(caption, prompt)):
            return "guarded", f"the caption has made up {made_up!r}"
        return "rewritten", ""

    def _missing(self, text: str, other: str) -> str | None:
        """A subject of a text that another text names neither by the same words nor by others."""
        names, words = self._vocabulary.names(other), f" {' '.join(self._vocabulary.key(other))} "
        for found in self._vocabulary.find(text):
            phrase = " ".join(found.key)
            if found.sure and not found.concepts & names and f" {phrase} " not in words:
                return phrase
        return None
