"""The scorer: a dual encoder that embeds prompts and pictures and reads what a picture shows.

open_clip and what it imports take seconds, so what needs it is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from models.scorer.frechet import Statistics, frechet

if TYPE_CHECKING:
    from models.scorer.loading import load_scorer
    from models.scorer.scorer import Reading, Scorer

__all__ = ["Reading", "Scorer", "Statistics", "frechet", "load_scorer"]

_HOMES = {"Reading": "scorer", "Scorer": "scorer", "load_scorer": "loading"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
