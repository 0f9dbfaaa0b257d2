"""What a compiled and captured function does on its first call, without a GPU: its parts are replaced by stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.training import compiled
from models.training.compiled import Compiled
from models.training.distributed import Ranks


class Replay:
    """As Captured: runs the function some times first, then at every call."""

    made = 0

    def __init__(self, function: Callable[..., Any], arguments: tuple[torch.Tensor, ...]) -> None:
        self._function = function
        type(self).made += 1
        for _ in range(3):
            function(*arguments)

    def __call__(self, *arguments: torch.Tensor) -> Any:
        return self._function(*arguments)


def unable(function: Callable[..., Any], arguments: tuple[torch.Tensor, ...]) -> Any:
    function(*arguments)
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """A GPU as far as `Compiled` can tell, whose compiler does nothing."""
    monkeypatch.setattr(compiled, "enabled", lambda _ranks: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return Ranks(0, 1, torch.device("cpu"), 0.0)


def step_of(ranks: Ranks, weight: torch.Tensor, name: str = "step") -> Compiled:
    def loss(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = (weight * x).sum()
        return value, value.detach()

    def clear() -> None:
        weight.grad = None

    return Compiled(loss, name, ranks, backward=True, clear=clear)


@pytest.mark.parametrize("capture", [Replay, unable])
def test_the_first_call_leaves_the_gradient_of_one(
    ranks: Ranks, capture: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "Captured", capture)
    weight = torch.ones(3, requires_grad=True)
    step = step_of(ranks, weight)
    x = torch.tensor([1.0, 2.0, 3.0])
    assert step(x)[1] == 6
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 2, 3]
    step(2 * x)
    assert weight.grad.tolist() == [3, 6, 9]


def test_what_cannot_be_captured_is_told(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "Captured", unable)
    step_of(ranks, torch.ones(3, requires_grad=True))(torch.ones(3))
    said = capsys.readouterr().out
    assert "capturing 'step' failed, running it UNCAPTURED" in said
    assert "stream is capturing" in said


def test_what_cannot_be_compiled_is_not_captured(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_function: object, **_options: object) -> Callable[..., Any]:
        def fail(*_arguments: torch.Tensor) -> Any:
            raise RuntimeError("no such lowering")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiled, "Captured", Replay)
    before = Replay.made
    weight = torch.ones(3, requires_grad=True)
    assert step_of(ranks, weight)(torch.ones(3))[1] == 3
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 1, 1]
    assert Replay.made == before
    assert "running it EAGERLY" in capsys.readouterr().out
