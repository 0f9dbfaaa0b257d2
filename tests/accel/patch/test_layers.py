"""Single layers on four ranks against what the paper says they compute from this step's inputs and the last one's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from accel.patch.conv import PatchConv2d
from accel.patch.exchange import MODES, Exchange
from accel.patch.mesh import Place, Team
from tests.accel.patch.layering import CONVS, CPU, GROUPS, PARTS, attention, batch, conv, norm, payload, run
from tests.accel.patch.ranks import run_ranks

BAND = 16 // PARTS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run, PARTS, tmp_path_factory.mktemp("ranks"))


def seen_by(part: int, fresh: torch.Tensor, stale: torch.Tensor) -> torch.Tensor:
    """The whole picture as a displaced part knows it: its own rows fresh, the others of the step before."""
    rows = torch.arange(16) // BAND == part
    return torch.where(rows[None, None, :, None], fresh, stale)


def rows_of(part: int, whole: torch.Tensor) -> torch.Tensor:
    return whole.tensor_split(PARTS, dim=2)[part]


@torch.no_grad()
def expect(ranks: list[dict[str, Any]], name: str, layer: nn.Module, stale: Callable[[int], int]) -> None:
    """Every rank's every step is the layer on what the part sees; `stale`: the step at which it sees the others."""
    for part, found in enumerate(ranks):
        for step, got in enumerate(found[name]):
            x = seen_by(part, batch(step, [0, 1]), batch(stale(step), [0, 1]))
            torch.testing.assert_close(got, rows_of(part, layer(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVS)
def test_convolution(ranks: list[dict[str, Any]], name: str) -> None:
    layer = conv(name)
    if name == "above only":  # an even kernel has one row of output too many for a picture that is not shared out
        layer = nn.Sequential(layer, nn.ZeroPad2d((0, 0, 0, -1)))
    expect(ranks, name, layer, lambda step: max(0, step - 1))
    expect(ranks, f"{name} at entry", layer, lambda step: step)


def test_convolution_without_communication_keeps_the_warm_up(ranks: list[dict[str, Any]]) -> None:
    expect(ranks, "no_sync", conv("stride 1"), lambda step: 0)


def test_attention(ranks: list[dict[str, Any]]) -> None:
    expect(ranks, "attention", attention(norm_groups=None), lambda step: max(0, step - 1))


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean of squares of every group, [R, G] each."""
    grouped = x.double().unflatten(1, (GROUPS, -1))
    return grouped.mean(dim=(2, 3, 4)), grouped.square().mean(dim=(2, 3, 4))


def normalised(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    layer = norm()
    unit = (x.double().unflatten(1, (GROUPS, -1)) - mean.view(2, -1, 1, 1, 1)) * (
        variance.view(2, -1, 1, 1, 1) + layer.eps
    ).rsqrt()
    scaled: torch.Tensor = unit.flatten(1, 2) * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    return scaled.float()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["displaced", "stale_gn", "separate_gn", "sync_gn"])
def test_group_norm(ranks: list[dict[str, Any]], mode: str) -> None:
    """Against Li et al. 2024, section 4, in float64."""
    for part, found in enumerate(ranks):
        for step, got in enumerate(found[mode]):
            fresh, stale = batch(step, [0, 1]), batch(max(0, step - 1), [0, 1])
            mine = moments(rows_of(part, fresh))
            if mode == "displaced":
                before, own = moments(stale), moments(rows_of(part, stale))
                mean, square = (old + new - was for old, new, was in zip(before, mine, own, strict=True))
            elif mode == "stale_gn":
                mean, square = moments(seen_by(part, fresh, stale))
            else:
                mean, square = moments(fresh) if mode == "sync_gn" else mine
            local = mine[1] - mine[0].square()
            variance = square - mean.square()
            variance = torch.where(variance < 0, local, variance)
            torch.testing.assert_close(
                got, normalised(rows_of(part, fresh), mean, variance), rtol=1e-4, atol=1e-4, msg=f"{mode} {part} {step}"
            )


@torch.no_grad()
def test_every_slot_has_its_own_past(ranks: list[dict[str, Any]]) -> None:
    """(step now, slot: step at which the others were seen) of each call of `_slots`."""
    layer = conv("stride 1")
    calls = [
        (0, {7: 0}),
        (0, {3: 0, 5: 0}),
        (1, {5: 0}),
        (2, {7: 0, 5: 1}),
        (3, {3: 0}),
        (4, {5: 2, 3: 3, 7: 2}),
        (10, {5: 10}),
        (11, {7: 4, 5: 10}),
    ]
    for part, found in enumerate(ranks):
        assert found["known"] == [True, False, True]
        assert found["held"] == 3
        for (step, past), got in zip(calls, found["slots"], strict=True):
            for row, (slot, seen) in enumerate(past.items()):
                x = seen_by(part, batch(step, [slot]), batch(seen, [slot]))
                torch.testing.assert_close(got[row], rows_of(part, layer(x))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_payloads_of_any_size_and_dtype(ranks: list[dict[str, Any]], rows: int) -> None:
    """Displaced swaps give what all gave at the step before, but this part's own fresh where that is asked for."""
    for part, found in enumerate(ranks):
        for step, layers in enumerate(found[f"payloads {rows}"]):
            for layer, got in enumerate(layers):
                seen = [step - step % 2] * PARTS  # even steps are synchronous
                if layer == 1:
                    seen[part] = step
                wanted = torch.stack([payload(layer, other, seen[other])[:rows] for other in range(PARTS)], dim=1)
                assert torch.equal(got, wanted), (part, step, layer)
        assert found["row_bytes"] == 4 * 16  # each payload fills one aligned pair of words


def test_compiled_as_one_graph(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for got, wanted in zip(found["compiled"], found["one by one"], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_meshes_that_cannot_be(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["refusals"] == [
            "ranks: [0, 4]; allowed: different ones from 0 to 3",
            "ranks: [0, 0]; allowed: different ones from 0 to 3",
            "ranks: [1, 0]; allowed: in ascending order",
            "ranks: []; allowed: different ones from 0 to 3",
        ]


def test_what_an_exchange_refuses() -> None:
    team = Team(Place(0, 2, None), None, None, None)  # type: ignore[arg-type]  # nothing is sent
    with pytest.raises(ValueError, match=f"mode: 'fast'; allowed: {', '.join(MODES)}"):
        Exchange(team, CPU, "fast")
    with pytest.raises(ValueError, match=r"slots: \[4\] are unknown here; allowed in a displaced call: \[\]"):
        Exchange(team, CPU).begin([4], synchronous=False)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), r"padding \(1, 1\) \(circular\)"),
        (nn.Conv2d(2, 2, 3, padding="same"), "padding same"),
        (nn.Conv2d(2, 2, 3, padding=2, dilation=2), r"dilation \(2, 2\)"),
        (nn.Conv2d(2, 2, 3, stride=2, padding=2), "stride"),
    ],
)
def test_convolutions_that_cannot_be_shared_out(layer: nn.Conv2d, reason: str) -> None:
    refusal = PatchConv2d.refusal(layer)
    assert refusal is not None
    assert re.search(reason, refusal)
