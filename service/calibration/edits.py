"""Prompts that differ in one thing, or in their words alone, made from the records of evaluation prompts.

An edit changes a word of the prompt and the same word of its record, so that the new picture can be judged as the old
one can. The words come from the other records, so that the model knows them. Plain text, of which no record tells what
it shows, has no edits; other words fit any prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from service.evaluation.prompts import Record

EDITS = ("background", "colour", "style", "concept")
_OTHER_WORDS: tuple[Callable[[str], str], ...] = (
    lambda prompt: f"a picture of {prompt}",
    lambda prompt: f"an image of {prompt}",
    lambda prompt: re.sub(r"^an? ", "", prompt),
    lambda prompt: re.sub(r"^an? ", "one ", prompt),
    lambda prompt: re.sub(r" on (an? [\w ]+ background)", r" with \1", prompt),
    lambda prompt: re.sub(r" on an? ([\w ]+ background)", r", \1", prompt),
    lambda prompt: re.sub(r" on an? ([\w ]+) background", r" on \1", prompt),
    lambda prompt: re.sub(r"^an? (.*), (\w+) style$", r"a \2 \1", prompt),
)


class Editor:
    """Knows the words that a set of records uses."""

    def __init__(self, records: Sequence[Record]) -> None:
        things = [thing for record in records for thing in record["objects"] or ()]
        grounds = [record["background"]["colours"] for record in records if record["background"]]
        found = {
            "background": {colour for colours in grounds for colour in colours},
            "colour": {thing["colour"] for thing in things},
            "style": {record["style"] for record in records},
            "concept": {thing["concept"] for thing in things},
        }
        self._words = {field: sorted(words - {None}) for field, words in found.items()}

    def edit(self, record: Record, draw: random.Random, field: str | None = None) -> Record | None:
        """The record with another word of one of EDITS, at random unless told which; None where none can be changed.

        Its id, seed and twin stay, for the caller to replace.
        """
        for chosen in draw.sample(EDITS, len(EDITS)) if field is None else [field]:
            edited = self._edited(record, draw, chosen)
            if edited is not None:
                return edited
        return None

    def _edited(self, record: Record, draw: random.Random, field: str) -> Record | None:
        old = _word(record, field)
        others = [word for word in self._words[field] if word != old]
        if old is None or not others:
            return None
        new = draw.choice(others)
        prompt = swapped(record["prompt"], old, new)
        if prompt == record["prompt"]:
            return None
        edited = record | {"prompt": prompt}
        if field == "background":
            ground = record["background"]
            return edited | {"background": ground | {"colours": [new, *ground["colours"][1:]]}}
        if field == "style":
            return edited | {"style": new}
        first, *rest = record["objects"]
        return edited | {"objects": [first | {field: new}, *rest]}


def _word(record: Record, field: str) -> str | None:
    """The word of the record that an edit of this field changes."""
    found: str | None
    if field == "style":
        found = record["style"]
    elif field == "background":
        colours = (record["background"] or {}).get("colours", [])
        found = colours[0] if colours else None
    else:
        found = record["objects"][0][field] if record["objects"] else None
    return found


def reworded(record: Record, draw: random.Random) -> Record:
    """The record in other words that mean the same."""
    ways = [way(record["prompt"]) for way in _OTHER_WORDS]
    return record | {"prompt": draw.choice([text for text in ways if text != record["prompt"]])}


def swapped(prompt: str, old: str, new: str) -> str:
    """The prompt with one word changed and its article with it; as it was where the word is not there just once."""
    pattern = re.compile(rf"\b(an? )?{re.escape(old)}\b")
    if len(pattern.findall(prompt)) != 1:
        return prompt
    article = "an " if new[0] in "aeiou" else "a "
    return pattern.sub(lambda found: (article if found[1] else "") + new, prompt)
