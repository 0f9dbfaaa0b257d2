"""Phrases by number, and weighted choices among them, a whole batch at once on the device."""

from collections.abc import Sequence

import torch

from models.training.wordings import Option

_UNSEEN_SHARE = 0.5


class Phrases:
    """The phrase table: each distinct phrase once, the empty phrase first. `unseen` ones are kept out of training."""

    def __init__(self) -> None:
        self.texts: list[str] = [""]
        self.unseen: set[int] = set()
        self._index: dict[str, int] = {"": 0}

    def add(self, text: str) -> int:
        """The number of a phrase; a leading star marks it as unseen and is not part of it."""
        plain = text.removeprefix("*")
        if plain not in self._index:
            self._index[plain] = len(self.texts)
            self.texts.append(plain)
        number = self._index[plain]
        if plain != text:
            self.unseen.add(number)
        return number


class Shares:
    """Weighted choice of a column, each row of the table with its own weights."""

    def __init__(self, rows: Sequence[Sequence[float]], device: torch.device) -> None:
        width = max(len(row) for row in rows)
        ends = torch.full((len(rows), width), 2.0, dtype=torch.float64)
        for row, weights in enumerate(rows):
            shares = torch.tensor(weights, dtype=torch.float64)
            last = int(shares.nonzero()[-1])  # whatever rounding does to its end, nothing after it is ever drawn
            ends[row, :last] = (shares.cumsum(0) / shares.sum())[:last]
        self._ends = ends.float().to(device)

    def draw(self, row: torch.Tensor) -> torch.Tensor:
        """Columns [B] for rows [B]."""
        chance = torch.rand(len(row), 1, device=row.device)
        return (chance >= self._ends[row]).sum(1)


class Choices:
    """Weighted choice of an option, which is one or several phrases; each row of the table has its own options."""

    def __init__(
        self, rows: Sequence[Sequence[Option]], phrases: Phrases, device: torch.device, unseen: bool = False
    ) -> None:
        """Options with a starred phrase have no weight, or with `unseen` half of it."""
        self._shares = Shares([_weights(row, unseen) for row in rows], device)
        width, columns = max(len(row) for row in rows), max(len(option) for row in rows for option in row) - 1
        ids = torch.zeros(len(rows), width, columns, dtype=torch.long)
        for r, row in enumerate(rows):
            for o, (_, *texts) in enumerate(row):
                ids[r, o, : len(texts)] = torch.tensor([phrases.add(text) for text in texts])
        self._ids = ids.to(device)

    def draw(self, row: torch.Tensor) -> torch.Tensor:
        """Phrase ids [B, columns] for rows [B]."""
        return self._ids[row, self._shares.draw(row)]


def _weights(row: Sequence[Option], unseen: bool) -> list[float]:
    """Shares of a row's options; starred ones have half of it with `unseen`, else nothing."""
    starred = [any(text.startswith("*") for text in texts) for _, *texts in row]
    share = _UNSEEN_SHARE if unseen and any(starred) else 0.0
    totals = [
        sum(option[0] for option, star in zip(row, starred, strict=True) if star is kept) for kept in (False, True)
    ]
    return [
        option[0] / totals[star] * (share if star else 1 - share) for option, star in zip(row, starred, strict=True)
    ]
