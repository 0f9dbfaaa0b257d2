"""Weighted choices: shares, options kept out, rows of different lengths."""

import pytest
import torch

from models.training.phrases import Choices, Phrases, Shares
from models.training.wordings import Options

CPU = torch.device("cpu")


def test_shares_are_kept_row_by_row() -> None:
    torch.manual_seed(0)
    shares = Shares([[1, 3], [0, 0, 5, 0]], CPU)
    drawn = shares.draw(torch.tensor([0, 1]).repeat(20_000))
    assert drawn[0::2].float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert (drawn[1::2] == 2).all()


def test_rounding_never_reaches_an_option_without_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = Shares([[0.1] * 10 + [0]], CPU)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, 1 - 2**-24))
    assert shares.draw(torch.zeros(1, dtype=torch.long)).tolist() == [9]


ROWS: list[Options] = [[(1, "small"), (1, "tiny"), (1, "*minute"), (7, "*wee")], [(1, "is", "are")]]


def test_starred_options_are_kept_out() -> None:
    phrases = Phrases()
    drawn = Choices(ROWS, phrases, CPU).draw(torch.zeros(500, dtype=torch.long))
    assert {phrases.texts[i] for i in drawn[:, 0].tolist()} == {"small", "tiny"}
    assert {phrases.texts[i] for i in phrases.unseen} == {"minute", "wee"}


def test_unseen_options_get_half_and_rows_without_them_stay() -> None:
    torch.manual_seed(0)
    phrases = Phrases()
    choices = Choices(ROWS, phrases, CPU, unseen=True)
    drawn = choices.draw(torch.zeros(10_000, dtype=torch.long))[:, 0]
    starred = torch.isin(drawn, torch.tensor(sorted(phrases.unseen)))
    assert starred.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert [phrases.texts[i] for i in choices.draw(torch.ones(1, dtype=torch.long))[0].tolist()] == ["is", "are"]
