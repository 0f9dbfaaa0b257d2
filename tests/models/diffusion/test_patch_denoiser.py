"""Several ranks draw what one rank draws: exactly where they wait for one another, and nearly where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.accel.patch.ranks import run_ranks
from tests.models.diffusion.patching import WAYS, check


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of four has measured; see patching.py."""
    folder = tmp_path_factory.mktemp("ranks")
    kinds = {"sd": tiny.sd, "sd2": tiny.sd2, "sdxl": tiny.sdxl, "lcm": tiny.lcm, "bundle": tiny.bundle_with_loras}
    folders: dict[str, Path] = {kind: build(folder / kind) for kind, build in kinds.items()}
    measured: dict[str, Any] = run_ranks(check, 4, folder, folders)[0]
    return measured


@pytest.mark.parametrize(("kind", "degree", "split"), [(kind, *way) for kind, ways in WAYS.items() for way in ways])
def test_synchronous_pictures_are_those_of_one_rank(found: dict[str, Any], kind: str, degree: int, split: bool) -> None:
    assert found[f"equal {kind} {degree} {split}"] < 1e-3


@pytest.mark.parametrize("kind", WAYS)
def test_the_plain_denoiser_goes_on_as_before(found: dict[str, Any], kind: str) -> None:
    assert found[f"afterwards {kind}"] == 0


def test_displaced_pictures_are_near_and_nearer_than_without_communication(found: dict[str, Any]) -> None:
    assert 1e-4 < found["displaced"] < 0.1
    assert found["displaced"] < 0.6 * found["no_sync"]


def test_group_norm_modes_order_as_in_the_paper(found: dict[str, Any]) -> None:
    assert found["sync_gn"] < found["displaced"] < found["separate_gn"]
    assert found["stale_gn"] != found["displaced"]


@pytest.mark.parametrize("split", [True, False])
def test_pictures_of_one_batch_do_not_know_of_one_another(found: dict[str, Any], split: bool) -> None:
    """They join at different ticks, one at a later row, one without guidance, one in a slot that another has left."""
    assert found[f"together {split}"] < 1e-4
    assert found[f"displaced {split}"] > 1e-3, "none of it was displaced"


def test_calls_of_a_batch(found: dict[str, Any]) -> None:
    """A picture's first two rows are synchronous, the others' rows of the same tick are not, and branches split."""
    by_slot = {slot: [warm for _, warm, slots in found["calls True"] if slot in slots] for slot in (0, 1, 3)}
    assert by_slot == {
        0: [True, True, False, False, False, True, True, False, False, False],  # two pictures, one after the other
        1: [True, True, False, False, False],
        3: [True, True, False, False],
    }
    assert {slot for split, _, slots in found["calls True"] if split for slot in slots} == {0, 3}
    assert not any(split for split, _, _ in found["calls False"])
    assert (False, False, (0, 1)) in found["calls False"], "guided and unguided rows run together where all share rows"


def test_loras_of_convolutions(found: dict[str, Any]) -> None:
    """LoRA layers look beyond a pixel too, and a set of them has exchanges of its own."""
    assert found["lora acts"] > 0.1
    for active in (True, False):
        assert found[f"lora {active} full_sync"] < 1e-4
        assert 1e-4 < found[f"lora {active} displaced"] < 0.2


@pytest.mark.parametrize("degree", [2, 4])
def test_decoding_is_that_of_one_rank(found: dict[str, Any], degree: int) -> None:
    difference, shape = found[f"decode {degree}"]
    assert difference <= 1  # of 255, by rounding
    assert shape == (2, 128, 72, 3)


def test_an_odd_number_of_ranks(found: dict[str, Any]) -> None:
    """Three ranks draw what divides by three, and refuse the rest before a follower has heard of it."""
    assert found["odd"] < 1e-4
    reason, told = found["refused"]
    assert reason == (
        "patch_degree 3 needs latent rows in multiples of 6, and this picture has 16; "
        "with 16 rows patch_degree 1, 2 would work"
    )
    assert told == 1, "only the end was told"
