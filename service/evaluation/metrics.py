"""The figures that can be asked for, and what each needs of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from service.errors import SetupError
from service.evaluation.prompts import TWINS, Prompt, Record

SHARES = {  # metric: the field of a record that says what is right
    "objects": "objects",
    "colours": "objects",
    "relation": "relation",
    "count": "objects",  # of several of a kind
    "style": "style",
    "background": "background",
    "all": "objects",
}
SCORE, FRECHET = "score", "frechet"
METRICS = (SCORE, *SHARES, FRECHET)


def parse_metrics(text: str | None) -> tuple[str, ...] | None:
    """Names with commas between them; None: whatever the prompts allow. Raises SetupError."""
    if text is None:
        return None
    names = tuple(text.split(","))
    for name in names:
        if name not in METRICS:
            raise SetupError(f"--metrics: {name!r} is not allowed; {', '.join(METRICS)}")
    return names


def check_metrics(path: Path, prompts: Sequence[Prompt], names: Sequence[str]) -> None:
    """Raises SetupError for a metric that the prompts have no field for, or say nothing of."""
    for name in names:
        field = SHARES.get(name, "prompt")
        for prompt in prompts:
            if field not in prompt.given:
                raise SetupError(f"metric {name} needs the field {field}, which {path} lacks: line {prompt.line}")
        if name in SHARES and not any(says(name, prompt.record) for prompt in prompts):
            raise SetupError(f"metric {name}: no prompt of {path} says anything of it")
    if FRECHET in names and sum(prompt.record["group"] != TWINS for prompt in prompts) < 2:
        raise SetupError("metric frechet needs two prompts or more")


def says(metric: str, record: Record) -> bool:
    """Whether the record says what this one of SHARES asks."""
    things = record["objects"] or ()
    if metric == "colours":
        return any(thing["colour"] is not None for thing in things)
    if metric == "count":
        return any(thing["count"] > 1 for thing in things)
    if metric == "relation":
        return record["relation"] not in (None, "and")  # "and" places neither
    return record[SHARES[metric]] is not None
