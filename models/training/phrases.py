"""Phrases by number, and weighted choices among them, a whole batch at once on the device."""

from collections.abc import Sequence

import torch

from models.training.wordings import Weighted, Wording


class Phrases:
    """The phrase table: each distinct phrase once, the empty phrase first."""

    def __init__(self) -> None:
        self.texts: list[str] = [""]
        self._index: dict[str, int] = {"": 0}

    def add(self, text: str) -> int:
        if text not in self._index:
            self._index[text] = len(self.texts)
            self.texts.append(text)
        return self._index[text]


class _Choice:
    """Weighted choice of an option's number."""

    def __init__(self, weights: Sequence[float], device: torch.device) -> None:
        shares = torch.tensor(weights, dtype=torch.float64)
        self._ends = (shares.cumsum(0) / shares.sum())[:-1].float().to(device)

    def draw(self, count: int) -> torch.Tensor:
        return torch.bucketize(torch.rand(count, device=self._ends.device), self._ends, right=True)


class Words:
    """Weighted choice of a phrase."""

    def __init__(self, options: Weighted, phrases: Phrases, device: torch.device) -> None:
        self._choice = _Choice([weight for weight, _ in options], device)
        self._ids = torch.tensor([phrases.add(text) for _, text in options], device=device)

    def draw(self, count: int) -> torch.Tensor:
        return self._ids[self._choice.draw(count)]


class Wordings:
    """Weighted choice of a background wording, with the article that suits the colour."""

    def __init__(self, options: Sequence[Wording], phrases: Phrases, device: torch.device) -> None:
        self._choice = _Choice([option[0] for option in options], device)
        table = [
            [phrases.add(before.format(a="a")), phrases.add(before.format(a="an")), phrases.add(between),
             phrases.add(after)]
            for _, before, between, after in options
        ]  # fmt: skip
        self._table = torch.tensor(table, device=device)

    def draw(self, vowel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(before, between, after) phrase ids, each [B]; `vowel` [B] says whether the colour's word needs 'an'."""
        row = self._table[self._choice.draw(len(vowel))]
        return torch.where(vowel, row[:, 1], row[:, 0]), row[:, 2], row[:, 3]


class Variants:
    """Per concept (or colour), its alternative phrases as a padded table [N, V]."""

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device) -> None:
        width = max(1, *(len(row) for row in rows))
        padded = [[*row, *([0] * (width - len(row)))] for row in rows]
        self.table = torch.tensor(padded, device=device)
        self.counts = torch.tensor([len(row) for row in rows], device=device)

    def draw(self, index: torch.Tensor) -> torch.Tensor:
        """A number below the row's count, uniformly; 0 where the row is empty."""
        return (torch.rand(len(index), device=index.device) * self.counts[index]).long()

    def take(self, index: torch.Tensor, variant: torch.Tensor) -> torch.Tensor:
        return self.table[index, variant]
