"""Streams of prompts: read from a file, or made up.

A file is plain text with a prompt a line, JSON Lines, or parquet (where pyarrow is installed), with a column `prompt`
and, if it likes, `time` (sorts them) and `user`; lines that are records of evaluation prompts can be judged in full.

The synthetic stream is made of the records of evaluation prompts. Each request is one of

    20%  a prompt unlike those before: the next record, in random order; it opens a session of its own user
    35%  a popular one: one of the records so far, the r-th that appeared with a weight of 1/r (Zipf's law), word for
         word three times in five, else in other words, by a user who asks nothing else
    45%  the next request of one of the last 8 sessions: its prompt with one word changed (a colour, the style, the
         object); one session in five ends there

and comes an exponentially distributed time after the one before, one a second on average. Every request has a seed of
its own. Once all records are used, a new one is an old one with every word changed that can be.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from service.calibration.edits import EDITS, Editor, reworded
from service.evaluation.prompts import FIELDS, Record
from service.events import MAX_SEED

NEW, POPULAR = 0.20, 0.35  # shares of requests; the rest are sessions'
WORD_FOR_WORD = 0.6  # of popular ones
SESSIONS = 8  # that are open at a time
LAST_EDIT = 0.2  # the chance that a session ends with an edit
TIMES, USERS = ("time", "timestamp"), ("user", "user_name", "user_id")


class Asked(NamedTuple):
    """One request. time: seconds, or whatever the file has, for sorting; user: who asks."""

    record: Record
    time: Any
    user: str


def read_trace(path: Path, seed: int) -> list[Asked]:
    """The requests of a file in the order of their times, or as they stand where they have none.

    Stops the program if the file is none.
    """
    try:
        rows = _parquet(path) if path.suffix == ".parquet" else _lines(path.read_text(encoding="utf-8-sig"))
        asked = [_asked(row, number, seed) for number, row in enumerate(rows)]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    if not asked:
        raise SystemExit(f"{path}: has no prompts")
    return asked if any(each.time is None for each in asked) else sorted(asked, key=lambda each: each.time)


def _lines(text: str) -> list[Mapping[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    return [json.loads(line) if lines[0].lstrip().startswith("{") else {"prompt": line.strip()} for line in lines]


def _parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise SystemExit("pyarrow is not installed; it is needed to read parquet") from None
    wanted = {"prompt", *TIMES, *USERS, *FIELDS}
    columns = [name for name in pyarrow.parquet.read_schema(path).names if name in wanted]
    rows: list[Mapping[str, Any]] = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    return rows


def _asked(row: Mapping[str, Any], number: int, seed: int) -> Asked:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"request {number + 1} has no prompt")
    record = {field: row.get(field) for field in FIELDS} | {"prompt": prompt.strip()}
    if record["seed"] is None:
        record["seed"] = (seed + number) % (MAX_SEED + 1)
    time, user = (next((row[name] for name in names if row.get(name) is not None), None) for names in (TIMES, USERS))
    return Asked(record, time, str(user or ""))


def synthetic(records: Sequence[Record], count: int, seed: int) -> list[Asked]:
    """`count` requests made of at least two records, the same for the same arguments."""
    draw = random.Random(seed)
    editor, fresh = Editor(records), draw.sample(list(records), len(records))
    seen: list[Record] = []
    weights = list(itertools.accumulate(1 / rank for rank in range(1, count + 1)))
    sessions: list[tuple[str, Record]] = []  # user, what it asked last
    asked: list[Asked] = []
    time = 0.0
    for number in range(count):
        time += draw.expovariate(1.0)
        kind, user = draw.random(), f"user-{number}"
        if not seen or kind < NEW:
            record = fresh.pop() if fresh else _changed(draw.choice(records), editor, draw)
            seen.append(record)
            sessions = [*sessions[1 - SESSIONS :], (user, record)]
        elif kind < NEW + POPULAR or not sessions:
            (record,) = draw.choices(seen, cum_weights=weights[: len(seen)])
            record = record if draw.random() < WORD_FOR_WORD else reworded(record, draw)
        else:
            user, record = sessions.pop(draw.randrange(len(sessions)))
            record = editor.edit(record, draw) or reworded(record, draw)
            if draw.random() >= LAST_EDIT:
                sessions.append((user, record))
        asked.append(Asked(record | {"seed": draw.randrange(MAX_SEED + 1)}, time, user))
    return asked


def _changed(record: Record, editor: Editor, draw: random.Random) -> Record:
    for field in EDITS:
        record = editor.edit(record, draw, field) or record
    return record


def told(asked: Iterable[Asked]) -> str:
    """What a stream is like, in a line."""
    asked = list(asked)
    prompts = {each.record["prompt"] for each in asked}
    return f"{len(asked)} requests of {len({each.user for each in asked})} users, {len(prompts)} different prompts"
