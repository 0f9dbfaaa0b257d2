"""Pages of slots: never two in one place, never more than there are, ahead of need, undone when the driver fails."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from accel.memory.page_driver import VirtualMemoryError
from accel.memory.slot_pages import KVFull, SlotPages
from tests.accel.fake_pages import PAGE, FakePages

SLOT_PAGES = 8


@contextmanager
def open_slots(driver: FakePages, slots: int = 4, pages: int = 20) -> Iterator[SlotPages]:
    """Slots without pages mapped ahead for the next request, unless one starts with several."""
    space = SlotPages(driver, slots, SLOT_PAGES, pages)
    try:
        yield space
    finally:
        driver.failing.clear()
        space.close()
        assert driver.broken == []
        assert (driver.mapped, driver.created, driver.reserved) == ({}, set(), {})


def mapped_in(driver: FakePages, space: SlotPages, slot: int) -> int:
    """Pages mapped in a slot, from its first on without a gap."""
    start = space.address + slot * SLOT_PAGES * PAGE
    here = sorted(address for address in driver.mapped if start <= address < start + SLOT_PAGES * PAGE)
    assert here == [start + i * PAGE for i in range(len(here))]
    return len(here)


def test_a_slot_grows_by_what_it_lacks_with_one_call() -> None:
    driver = FakePages()
    with open_slots(driver) as space:
        space.ensure(1, 3)
        space.ensure(1, 2)
        space.ensure(1, 5)
        in_slot = [call for call in driver.calls if space.address + 8 * PAGE <= call[1] < space.address + 16 * PAGE]
        assert in_slot == [("map", space.address + 8 * PAGE, 3), ("map", space.address + 11 * PAGE, 2)]
        assert space.available == 15


def test_memory_is_taken_at_once_and_no_more_than_that() -> None:
    driver = FakePages()
    with open_slots(driver, pages=5) as space:
        assert len(driver.created) == 5
        space.ensure(0, 5)
        with pytest.raises(KVFull, match=r"slot 1 lacks 1 pages of 4096 bytes; 0 are left"):
            space.ensure(1, 1)
        assert space.mapped == 5
        space.free(0)
        space.ensure(1, 5)
        assert len(driver.created) == 5


def test_a_device_with_too_little_memory_keeps_nothing() -> None:
    driver = FakePages(capacity=4)
    with pytest.raises(VirtualMemoryError, match="out of memory"):
        SlotPages(driver, 2, SLOT_PAGES, 5)
    assert (driver.created, driver.reserved, driver.broken) == (set(), {}, [])


def test_prefetched_pages_are_there_when_they_are_needed() -> None:
    driver = FakePages()
    with open_slots(driver) as space:
        space.ensure(0, 1)
        space.prefetch(0, 4)
        space.settle()
        assert mapped_in(driver, space, 0) == 4
        assert space.seconds_background > 0
        driver.calls.clear()
        driver.failing.add("map")
        space.ensure(0, 4)
        assert driver.calls == []
        assert space.available == 16


def test_the_background_is_a_thread_of_its_own_that_announced_itself() -> None:
    driver = FakePages()
    with open_slots(driver) as space:
        space.prefetch(0, 2)
        space.settle()
        assert driver.threads == {"entered slot-pages", "slot-pages"}


def test_a_freed_slot_keeps_its_pages_for_its_next_owner() -> None:
    driver = FakePages()
    with open_slots(driver) as space:
        space.ensure(2, 5)
        space.free(2)
        space.settle()
        assert mapped_in(driver, space, 2) == 5
        assert space.next_slot() == 2
        assert space.available == 20
        driver.calls.clear()
        space.ensure(2, 4)
        assert not [call for call in driver.calls if call[1] >= space.address + 16 * PAGE]


def test_a_slot_that_never_grew_can_be_freed_and_is_next() -> None:
    """A batch may fail before all of its sequences have grown; then all of them are freed."""
    driver = FakePages()
    driver.fenced = True
    with open_slots(driver) as space:
        space.ensure(0, 2)
        space.free(3)
        assert driver.fences == []
        assert (space.next_slot(), space.available) == (3, 18)
        space.free(0)
        space.free(0)
        assert len(driver.fences) == 1
        assert (space.next_slot(), space.available) == (0, 20)


def test_pages_move_from_the_slot_freed_longest_ago_and_only_as_many_as_are_lacked() -> None:
    driver = FakePages()
    with open_slots(driver, pages=6) as space:
        for slot in (0, 1):
            space.ensure(slot, 3)
        space.free(1)
        space.free(0)
        space.settle()
        driver.calls.clear()
        space.ensure(2, 2)
        space.settle()
        assert driver.calls[:3] == [
            ("unmap", space.address + 10 * PAGE, 1),
            ("unmap", space.address + 9 * PAGE, 1),
            ("map", space.address + 16 * PAGE, 2),
        ]
        assert mapped_in(driver, space, 0) == 3


def test_pages_mapped_ahead_for_a_slot_in_use_are_given_up_for_what_is_needed() -> None:
    driver = FakePages()
    with open_slots(driver, pages=6) as space:
        space.ensure(0, 1)
        space.prefetch(0, 6)
        space.settle()
        assert space.available == 5
        space.ensure(1, 5)
        assert (mapped_in(driver, space, 0), mapped_in(driver, space, 1)) == (1, 5)


def test_the_next_slot_has_as_many_pages_as_the_latest_request_began_with() -> None:
    driver = FakePages()
    with open_slots(driver) as space:
        space.ensure(0, 3)
        space.ensure(0, 5)
        space.settle()
        following = space.next_slot()
        assert following not in (0, None)
        assert mapped_in(driver, space, following) == 3
        assert space.mapped == 8


def test_mapping_ahead_leaves_a_tenth_for_those_in_need() -> None:
    driver = FakePages()
    with open_slots(driver, pages=20) as space:
        for slot in range(3):
            space.ensure(slot, 6)
        space.settle()
        assert space.mapped == 18


def test_the_background_takes_pages_of_freed_slots_until_a_tenth_is_unmapped() -> None:
    driver = FakePages()
    with open_slots(driver, slots=5, pages=20) as space:
        for slot, pages in enumerate((4, 4, 4, 8)):
            space.ensure(slot, pages)
        for slot in range(4):
            space.free(slot)
        space.settle()
        assert space.mapped == 18
        assert [mapped_in(driver, space, slot) for slot in range(4)] == [2, 4, 4, 8]


def test_pages_move_on_only_when_the_device_is_done_with_their_last_owner() -> None:
    driver = FakePages()
    driver.fenced = True
    with open_slots(driver, slots=3, pages=6) as space:
        space.ensure(0, 6)
        space.free(0)
        fence = driver.fences[-1]
        assert fence is not None
        space.ensure(0, 1)  # the same slot: nothing moves
        assert fence.waits == 0
        space.ensure(1, 2)  # pages of the former owner move
        assert fence.waits == 1


def test_the_background_takes_only_pages_that_the_device_is_done_with() -> None:
    driver = FakePages()
    driver.fenced = True
    with open_slots(driver, slots=2, pages=6) as space:
        space.ensure(1, 1)
        space.ensure(0, 5)
        space.free(0)
        space.prefetch(1, 4)
        space.settle()
        assert mapped_in(driver, space, 1) == 1
        assert driver.fences[-1] is not None
        driver.fences[-1].passed = True
        space.prefetch(1, 4)
        space.settle()
        assert mapped_in(driver, space, 1) == 4


@pytest.mark.parametrize("used", [False, True])
def test_an_error_while_mapping_changes_nothing_and_is_told(used: bool) -> None:
    driver = FakePages()
    with open_slots(driver) as space:
        if used:
            space.ensure(0, 2)
            space.settle()
        before = space.mapped, space.available, dict(driver.mapped)
        driver.failing.add("map")
        with pytest.raises(VirtualMemoryError, match="told to fail"):
            space.ensure(0, 4)
        assert (space.mapped, space.available, driver.mapped) == before
        driver.failing.clear()
        space.ensure(0, 4)


def test_an_error_while_taking_pages_from_others_loses_none() -> None:
    driver = FakePages()
    with open_slots(driver, slots=2, pages=6) as space:
        space.ensure(0, 6)
        space.free(0)
        driver.failing.add("unmap")
        with pytest.raises(VirtualMemoryError, match="told to fail"):
            space.ensure(1, 3)
        assert (space.mapped, space.available) == (6, 6)
        driver.failing.clear()
        space.ensure(1, 6)


def test_an_error_in_the_background_is_logged_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakePages()
    with open_slots(driver) as space:
        driver.failing.add("map")
        with caplog.at_level(logging.ERROR):
            space.prefetch(0, 3)
            space.settle()
        assert "ahead of need failed" in caplog.text
        assert space.mapped == 0
        driver.failing.clear()
        space.prefetch(0, 3)
        space.settle()
        assert mapped_in(driver, space, 0) == 3


def test_slots_that_nobody_uses_do_not_take_pages_from_each_other() -> None:
    driver = FakePages()
    with open_slots(driver, slots=2, pages=10) as space:
        space.prefetch(0, 8)
        space.prefetch(1, 8)
        space.settle()
        assert sorted(mapped_in(driver, space, slot) for slot in (0, 1)) == [1, 8]


def test_freeing_a_slot_calls_its_prefetch_off() -> None:
    driver = FakePages()
    driver.seconds = 0.05
    with open_slots(driver, pages=40) as space:
        space.ensure(1, 1)
        space.prefetch(0, 2)  # keeps the background busy
        space.prefetch(1, 8)
        space.free(1)
        space.settle()
        assert mapped_in(driver, space, 1) <= 2


def test_long_prefetches_take_turns_with_others() -> None:
    """Someone in need waits for one call of the background's, not for all that it was asked for."""
    driver = FakePages()
    driver.seconds = 0.02
    space = SlotPages(driver, 2, 400, 800)
    space.prefetch(0, 400)
    while not driver.calls:
        time.sleep(0.001)
    space.ensure(1, 1)
    assert 0 < mapped_pages(driver, space.address, 400) < 100
    space.settle()
    assert mapped_pages(driver, space.address, 400) == 400
    space.close()
    assert driver.broken == []


def mapped_pages(driver: FakePages, start: int, pages: int) -> int:
    return sum(start <= address < start + pages * PAGE for address in list(driver.mapped))


def test_closing_stops_the_background_and_is_final() -> None:
    driver = FakePages()
    driver.seconds = 0.005
    space = SlotPages(driver, 4, 100, 400)
    for slot in range(4):
        space.prefetch(slot, 100)
    space.close()
    space.close()
    space.settle()
    assert (driver.mapped, driver.created, driver.reserved, driver.broken) == ({}, set(), {}, [])
    with pytest.raises(ValueError, match="the KV is closed"):
        space.ensure(0, 1)
    assert not [thread for thread in threading.enumerate() if thread is space._thread]


def test_closing_waits_for_the_device() -> None:
    driver = FakePages()
    driver.fenced = True
    space = SlotPages(driver, 2, SLOT_PAGES, 4)
    space.ensure(0, 2)
    space.close()
    assert driver.fences[-1] is not None
    assert driver.fences[-1].waits == 1


def test_many_threads_never_break_a_rule() -> None:
    driver = FakePages()
    driver.seconds = 0.0002
    with open_slots(driver, slots=6, pages=30) as space:
        full = []

        def run(slots: list[int], seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(60):
                slot, pages = choose.choice(slots), choose.randint(1, SLOT_PAGES)
                try:
                    space.ensure(slot, pages)
                except KVFull:
                    full.append(slot)
                    continue
                assert mapped_in(driver, space, slot) >= pages
                space.prefetch(slot, min(SLOT_PAGES, pages + choose.randint(0, 3)))
                space.free(slot)

        threads = [threading.Thread(target=run, args=([i, i + 3], i)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        space.settle()
        assert space.available == 30
        assert full == []  # three times eight pages are there


class Books(RuleBasedStateMachine):
    """Any order of requests, failures included: `ensure` succeeds exactly if the budget holds what is in use."""

    slots = 5

    @initialize(pages=st.integers(1, 30), fenced=st.booleans())
    def open(self, pages: int, fenced: bool) -> None:
        self.driver = FakePages()
        self.driver.fenced = fenced
        self.pages = pages
        self.space = SlotPages(self.driver, self.slots, SLOT_PAGES, pages)
        self.needed: dict[int, int] = {}

    @rule(slot=st.integers(0, 4), pages=st.integers(0, SLOT_PAGES), failing=st.sampled_from([None, "map", "unmap"]))
    def ensure(self, slot: int, pages: int, failing: str | None) -> None:
        after = {**self.needed, slot: max(pages, self.needed.get(slot, 0))}
        if failing:
            self.driver.failing.add(failing)
        try:
            self.space.ensure(slot, pages)
        except KVFull:
            assert sum(after.values()) > self.pages
        except VirtualMemoryError:
            assert failing
        else:
            assert sum(after.values()) <= self.pages
            self.needed = after
        self.driver.failing.clear()

    @rule(slot=st.integers(0, 4), pages=st.integers(1, SLOT_PAGES))
    def prefetch(self, slot: int, pages: int) -> None:
        self.space.prefetch(slot, pages)

    @rule(slot=st.integers(0, 4))
    def free(self, slot: int) -> None:
        self.space.free(slot)
        self.needed.pop(slot, None)
        assert self.space.next_slot() == slot

    @rule()
    def pass_fences(self) -> None:
        for fence in self.driver.fences:
            if fence is not None:
                fence.passed = True

    @rule()
    def settle(self) -> None:
        self.space.settle()
        for slot in range(self.slots):
            assert mapped_in(self.driver, self.space, slot) >= self.needed.get(slot, 0)
        assert self.space.mapped == len(self.driver.mapped)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "space"):
            assert self.driver.broken == []
            assert self.space.available == self.pages - sum(self.needed.values())
            assert len(self.driver.mapped) <= self.pages == len(self.driver.created)
            following = self.space.next_slot()
            assert following not in self.needed
            assert (following is None) == (len(self.needed) == self.slots)

    def teardown(self) -> None:
        if hasattr(self, "space"):
            self.space.close()
            assert (self.driver.mapped, self.driver.created, self.driver.broken) == ({}, set(), [])


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
