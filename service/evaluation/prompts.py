"""The prompts of an evaluation: JSON Lines of records, or plain text with one prompt a line.

A record says what its picture should show, so that a scorer can tell whether it does:

    {"id": "single-1", "group": "single", "prompt": "a small blue apple, flat style",
     "objects": [{"concept": "apple", "count": 1, "colour": "blue", "size": "small"}], "relation": null,
     "style": "flat", "background": {"ground": "plain", "colours": ["white"]}, "seed": 7, "twin": null}

Only `prompt` is needed. null means that the prompt says nothing of it. `relation` is that of the first of two objects
to the second. Records of the group "twins" say in plain words what those that name them in `twin` say in others: they
are there for comparison only.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import SetupError
from service.events import MAX_SEED

if TYPE_CHECKING:
    from models.scorer.config import Vocabulary

Record = dict[str, Any]

FIELDS = ("id", "group", "prompt", "objects", "relation", "style", "background", "seed", "twin")
OBJECT_FIELDS = ("concept", "count", "colour", "size")
TWINS = "twins"  # a group
SIZES = ("small", "large")
MAX_COUNT = 5
SHOWN = 8  # names of a long list that an error message shows


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line.

    given: the fields that the line has, those that are null too.
    record: every field of FIELDS, None where the line says nothing; `id`, `seed` and every field of an object are
        filled in.
    """

    line: int
    given: frozenset[str]
    record: Record


def read_prompts(path: Path, seed: int = 0) -> list[Prompt]:
    """Prompts of a file, blank lines left out.

    Args:
        seed: a record without a seed gets seed + its line's number.

    Raises:
        SetupError: the file cannot be read or has no prompt, or a line is not what it should be; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SetupError(f"{path}: not UTF-8 text: byte {error.start}") from None
    # Not splitlines(), which also ends lines at characters that JSON strings may hold.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise SetupError(f"{path}: has no prompts")
    as_records = path.suffix == ".jsonl" or lines[0][1].startswith("{")
    prompts = []
    for number, line in lines:
        try:
            fields = _parsed(line) if as_records else {"prompt": line}
            prompts.append(Prompt(number, frozenset(fields), _completed(fields, number, seed)))
        except ValueError as error:
            raise SetupError(f"{path}: line {number}: {error}") from None
    if all(prompt.record["group"] == TWINS for prompt in prompts):
        raise SetupError(f"{path}: has no prompts but those of the group {TWINS!r}")
    _check_ids(path, prompts)
    return prompts


def check_names(path: Path, prompts: Sequence[Prompt], known: Vocabulary) -> None:
    """Raises SetupError for the first name that the scorer does not know."""
    for prompt in prompts:
        record = prompt.record
        background = record["background"] or {}
        named = [
            *(("concept", thing["concept"], known.names) for thing in record["objects"] or ()),
            *(("colour", thing["colour"], known.tints) for thing in record["objects"] or ()),
            ("relation", record["relation"], ("and", *known.relations)),
            ("style", record["style"], known.styles),
            ("ground", background.get("ground"), known.grounds),
            *(("colour", colour, known.colours) for colour in background.get("colours", ())),
        ]
        for field, name, names in named:
            if name is not None and name not in names:
                raise SetupError(f"{path}: line {prompt.line}: {field}: {name!r} is not known; {_listed(name, names)}")


def sample(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """`limit` prompts spread evenly over the file, and the twins of those, which do not count; all of them for None."""
    if limit is None:
        return list(prompts)
    own = [prompt for prompt in prompts if prompt.record["group"] != TWINS]
    count = min(limit, len(own))
    chosen = [own[i * len(own) // count] for i in range(count)]
    wanted = {prompt.record[name] for prompt in chosen for name in ("id", "twin")}
    return [prompt for prompt in prompts if prompt.record["id"] in wanted]


def _parsed(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    _check_fields("", fields, FIELDS)
    return fields


def _completed(fields: dict[str, Any], line: int, seed: int) -> Record:
    """All fields of a record, their types checked. Raises ValueError."""
    objects = fields.get("objects")
    if objects is not None and not (isinstance(objects, list) and 1 <= len(objects) <= 2):
        raise ValueError(f"objects: {_shown(objects)} is not allowed; a list of one or two objects")
    record = {
        "id": _text(fields, "id", r"[\w.-]{1,100}", "letters, digits, dots, - and _") or str(line),
        "group": _text(fields, "group"),
        "prompt": _text(fields, "prompt", r"(?s).*\S.*"),
        "objects": None if objects is None else _objects(objects),
        "relation": _text(fields, "relation"),
        "style": _text(fields, "style"),
        "background": _background(fields.get("background")),
        "seed": _integer(fields, "seed", 0, MAX_SEED, (seed + line) % (MAX_SEED + 1)),
        "twin": _text(fields, "twin"),
    }
    if record["prompt"] is None:
        raise ValueError("has no prompt")
    if record["relation"] is not None and len(objects or ()) != 2:
        raise ValueError(f"relation: {record['relation']!r} is not allowed; only between two objects")
    return record


def _objects(things: list[object]) -> list[dict[str, Any]]:
    objects = [_object(thing) for thing in things]
    if len({thing["concept"] for thing in objects}) < len(objects):
        # The scorer counts and colours by concept, so that it could not tell one from the other.
        raise ValueError(f"objects: {objects[0]['concept']!r} is named twice; two objects must be of two concepts")
    return objects


def _object(thing: object) -> dict[str, Any]:
    if not isinstance(thing, dict):
        raise ValueError(f"objects: {_shown(thing)} is not allowed; {{{', '.join(OBJECT_FIELDS)}}}")
    _check_fields("objects: ", thing, OBJECT_FIELDS)
    concept = _text(thing, "concept")
    if concept is None:
        raise ValueError("objects: an object has no concept")
    return {
        "concept": concept,
        "count": _integer(thing, "count", 1, MAX_COUNT, 1),
        "colour": _text(thing, "colour"),
        "size": _text(thing, "size", "|".join(SIZES), " or ".join(SIZES)),
    }


def _background(value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"background: {_shown(value)} is not allowed; {{ground, colours}}")
    _check_fields("background: ", value, ("ground", "colours"))
    colours = value.get("colours", [])
    if not isinstance(colours, list) or not all(isinstance(colour, str) for colour in colours):
        raise ValueError(f"colours: {_shown(colours)} is not allowed; a list of names")
    ground = _text(value, "ground")
    if ground is None:
        raise ValueError("background: has no ground")
    return {"ground": ground, "colours": colours}


def _check_fields(where: str, fields: dict[str, Any], known: Sequence[str]) -> None:
    unknown = next((name for name in fields if name not in known), None)
    if unknown is not None:
        raise ValueError(f"{where}{unknown!r} is no field; {_listed(unknown, known)}")


def _text(
    fields: dict[str, Any], name: str, pattern: str = ".+", allowed: str = "text that is not empty"
) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
        raise ValueError(f"{name}: {_shown(value)} is not allowed; {allowed}")
    if not value.isascii() and any(unicodedata.category(character) == "Cs" for character in value):
        raise ValueError(f"{name}: {value!a} is not allowed; text without lone surrogates")  # no file could hold it
    return value


def _integer(fields: dict[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name}: {_shown(value)} is not allowed; an integer from {low} to {high}")
    return value


def _check_ids(path: Path, prompts: Sequence[Prompt]) -> None:
    """Ids are distinct, and twins are among them."""
    lines: dict[str, int] = {}
    for prompt in prompts:
        name = prompt.record["id"]
        if name in lines:
            raise SetupError(f"{path}: line {prompt.line}: id: {name!r} is that of line {lines[name]} too")
        lines[name] = prompt.line
    for prompt in prompts:
        twin = prompt.record["twin"]
        if twin is not None and twin not in lines:
            raise SetupError(f"{path}: line {prompt.line}: twin: no line has the id {twin!r}")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _listed(name: str, names: Sequence[str]) -> str:
    """What is allowed: the names that are close, or else all, or the first of many."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {', '.join(near)}?"
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"allowed are {', '.join(names[:SHOWN])}{rest}"
