"""What a prompt may be, whoever reads it."""

from __future__ import annotations

import unicodedata

from service.errors import invalid

MAX_PROMPT = 2000  # characters


def checked_text(field: str, value: str, least: int) -> str:
    """A prompt without blanks at its ends.

    Args:
        least: characters.

    Raises:
        InputError: it is too short or too long, or has characters that are no text.
    """
    text = value.strip()
    if not least <= len(text) <= MAX_PROMPT:
        raise invalid(field, value, f"{least} to {MAX_PROMPT} characters, blanks at the ends not counted")
    for character in text:
        # Cc: control characters; Cs: lone surrogates, which no tokenizer can encode.
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            raise invalid(field, value, "no control characters other than newline and tab")
    return text
