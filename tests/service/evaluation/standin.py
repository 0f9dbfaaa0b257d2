"""A scorer without networks, whose verdicts follow from the pixels alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Words(NamedTuple):
    names: tuple[str, ...] = ("apple", "cat", "dog", "fox", *(f"thing {number}" for number in range(20)))
    tints: tuple[str, ...] = ("natural", "red", "blue")
    styles: tuple[str, ...] = ("3d", "flat")
    grounds: tuple[str, ...] = ("plain", "sea")
    colours: tuple[str, ...] = ("white", "navy")
    relations: tuple[str, ...] = ("left of", "on")


class Seen(NamedTuple):
    features: torch.Tensor  # [N, 3] mean colours


class StandIn:
    """Objects are right where a picture has more red than the median of those read with it; so on by channel."""

    device = torch.device("cpu")
    vocabulary = Words()

    def __init__(self) -> None:
        self.judged: list[dict[str, Any]] = []

    def read(self, pictures: torch.Tensor) -> Seen:
        assert pictures.dtype == torch.float32
        assert pictures.shape[1] == 3
        assert -1 <= pictures.min() <= pictures.max() <= 1
        return Seen(pictures.mean((2, 3)))

    def judge(self, seen: Seen, records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        self.judged += map(dict, records)
        red, green, blue = (seen.features > seen.features.median()).T.tolist()
        return {
            "objects": red,
            "colours": green,
            "relation": blue,
            "count": red,
            "style": green,
            "background": blue,
            "all": [all(verdicts) for verdicts in zip(red, green, blue, strict=True)],
            "score": seen.features.mean(1).tolist(),
        }
