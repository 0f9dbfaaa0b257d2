"""Latent slots: taking, giving back, growing, and how much memory is held."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.memory.latents import LatentSlots

SMALL, LARGE = (4, 8, 8), (4, 16, 8)


def test_a_slot_is_a_place_in_the_pool_of_its_shape() -> None:
    slots = LatentSlots(8)
    slot = slots.acquire(SMALL)
    x, previous, finite = slots.tensors(SMALL)
    assert x.shape[1:] == previous.shape[1:] == SMALL
    assert x.dtype == previous.dtype == torch.float32
    assert len(x) == len(previous) == len(finite) > slot
    assert finite[slot]


def test_a_pool_grows_and_keeps_what_it_holds() -> None:
    slots = LatentSlots(10)
    taken = [slots.acquire(SMALL) for _ in range(3)]
    x, previous, finite = slots.tensors(SMALL)
    for slot in taken:
        x[slot], previous[slot] = slot + 1, -slot - 1
    finite[taken[1]] = False
    taken += [slots.acquire(SMALL) for _ in range(7)]
    assert sorted(taken) == list(range(10))
    x, previous, finite = slots.tensors(SMALL)
    assert len(x) == 10
    for slot in taken[:3]:
        assert (x[slot] == slot + 1).all()
        assert (previous[slot] == -slot - 1).all()
    assert finite.tolist() == [slot != taken[1] for slot in range(10)]


def test_a_slot_is_marked_finite_for_its_next_owner() -> None:
    slots = LatentSlots(1)
    slot = slots.acquire(SMALL)
    slots.tensors(SMALL)[2][slot] = False
    slots.release(SMALL, slot)
    assert slots.tensors(SMALL)[2][slots.acquire(SMALL)]


def test_the_limit_counts_all_shapes() -> None:
    slots = LatentSlots(3)
    first = slots.acquire(SMALL)
    slots.acquire(LARGE)
    slots.acquire(LARGE)
    assert (len(slots), slots.free) == (3, 0)
    with pytest.raises(MemoryError, match="all 3 latent slots are in use"):
        slots.acquire(SMALL)
    slots.release(SMALL, first)
    slots.acquire(LARGE)


def test_giving_back_twice_or_what_was_never_taken_is_an_error() -> None:
    slots = LatentSlots(4)
    slot = slots.acquire(SMALL)
    slots.release(SMALL, slot)
    with pytest.raises(ValueError, match=rf"slot {slot} of shape \(4, 8, 8\) is not in use"):
        slots.release(SMALL, slot)
    with pytest.raises(ValueError, match="slot 99"):
        slots.release(SMALL, 99)
    with pytest.raises(ValueError, match=r"slot 0 of shape \(4, 16, 8\)"):
        slots.release(LARGE, 0)
    with pytest.raises(ValueError, match="limit: 0; allowed: at least 1"):
        LatentSlots(0)


def test_pools_without_pictures_are_dropped_when_a_shape_arrives() -> None:
    slots = LatentSlots(4)
    for width in range(1, 50):
        shape = (4, 8, width)
        slots.release(shape, slots.acquire(shape))
        assert slots.shapes == (shape,)
    kept = slots.acquire(SMALL)
    slots.acquire(LARGE)
    assert slots.shapes == (SMALL, LARGE)
    slots.release(SMALL, kept)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([SMALL, LARGE])), max_size=60))
def test_no_two_pictures_ever_share_a_slot(moves: list[tuple[bool, tuple[int, int, int]]]) -> None:
    slots, held = LatentSlots(9), list[tuple[tuple[int, int, int], int]]()
    for take, shape in moves:
        if take and slots.free:
            held.append((shape, slots.acquire(shape)))
        elif not take and held:
            slots.release(*held.pop(0))
        assert len(set(held)) == len(held) == len(slots) == 9 - slots.free
        assert all(slot < len(slots.tensors(shape)[0]) for shape, slot in held)
