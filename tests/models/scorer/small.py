"""A scorer's folder with random weights beside the tiny text encoder and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.scorer.config import Sizes, Thresholds, Vocabulary
from models.scorer.loading import save_scorer
from models.scorer.network import ScorerNetwork
from tests import tiny

SIZES = Sizes(side=32, stem=(8,), width=16, layers=1, heads=2, embed=8, text_width=32)
WORDS = Vocabulary(
    names=("apple", "cat", "dog"),
    tints=("natural", "red", "blue"),
    styles=("3d", "flat"),
    grounds=("plain", "gradient", "sea"),
    colours=("red", "green", "white"),
    relations=("left of", "right of", "on"),
    own={"apple": ("red",)},
)


def network(seed: int = 0) -> ScorerNetwork:
    torch.manual_seed(seed)
    return ScorerNetwork(SIZES, WORDS).eval().requires_grad_(False)


def save(root: Path) -> None:
    tiny.bert(root)
    save_scorer(root / "scorer", network().state_dict(), SIZES, WORDS, Thresholds(0.4, 0.6))


def parts(root: Path) -> tuple[Path, Path, Path]:
    """The arguments of `load_scorer`."""
    return root / "scorer", root / "text_encoder", root / "tokenizer"


def record(*objects: tuple[str, int] | tuple[str, int, str], **said: Any) -> dict[str, Any]:
    """A record of (concept, count, colour) that says nothing else unless told to."""
    entries = [dict(zip(("concept", "count", "colour"), (*one, None)[:3], strict=True)) for one in objects]
    return {"prompt": "a cat", "objects": entries, "relation": None, "style": None, "background": None} | said
