"""From the tokens of one choice to its text: no half characters, and stop strings cut out wherever tokens break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Turns the tokens of one choice into text as they come; what is not a whole character yet waits."""

    def add(self, tokens: Sequence[int]) -> str: ...
    def finish(self) -> str: ...


class ChoiceText:
    """The text of one choice, given out as soon as it is certain that no stop string begins in it.

    Args:
        stop: strings that end the text; the first to be complete does, and neither it nor what follows is given out.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = ""  # the end of the text, which may be the beginning of a stop string
        self.stopped = False  # a stop string has come

    def add(self, token: int) -> str:
        """What the token makes certain; nothing after a stop string."""
        return self._release(self._detokenizer.add((token,)))

    def finish(self) -> str:
        """The rest, when the last token has been added: half characters are shown as U+FFFD."""
        text = self._release(self._detokenizer.finish())
        held, self._held = self._held, ""
        return text + held

    def _release(self, piece: str) -> str:
        if not self._stop:
            return piece
        if self.stopped:
            return ""
        text = self._held + piece
        cut = self._first_stop(text)
        if cut is not None:
            self.stopped = True
            self._held = ""
            return text[:cut]
        certain = len(text) - self._uncertain(text)
        self._held = text[certain:]
        return text[:certain]

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string that is complete first begins; of two that end together, the longer."""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _uncertain(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
