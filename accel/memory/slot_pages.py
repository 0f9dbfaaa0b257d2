"""Slots of address space, side by side, and the pages of one budget that are mapped into them ahead of need.

vAttention (Prabhu et al., 2024): a request's memory is contiguous in virtual memory and grows page by page. Mapping is
kept off the request's path in three ways: pages are mapped in the background before they are needed; a slot that is
freed keeps its pages until somebody lacks them, for the next request to find; and the slot that the next request will
get has pages mapped before the request comes.

    pages of a slot   0          needed       mapped              slot_pages
                      |- in use ---|- ahead ----|- address space only -|
                                   (a free slot needs none: all that it has mapped is ahead)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from accel.memory.page_driver import Fence, Page, PageDriver, VirtualMemoryError

log = logging.getLogger(__name__)

_MOST_AT_ONCE = 16  # pages that the background maps before others get their turn
_POOL_SHARE = 10  # the background keeps one page in this many unmapped, for whoever needs one at once


class KVFull(MemoryError):  # noqa: N818
    """The pages that slots in use need leave too few for what was asked; nothing has changed."""


class SlotPages:
    """Pages of `slots` slots, at most `pages` of them mapped at a time. Safe to call from several threads.

    All physical memory is taken from the device at once, so that growing cannot fail for others' sake.
    """

    def __init__(self, driver: PageDriver, slots: int, slot_pages: int, pages: int) -> None:
        """
        Raises:
            VirtualMemoryError: the device has too little address space or memory.
        """
        self._driver = driver
        self._slot_bytes = slot_pages * driver.page_bytes
        self._nbytes = slots * self._slot_bytes
        self.pages = pages
        self.address = driver.reserve(self._nbytes)
        self._pool: list[Page] = []
        try:
            for _ in range(pages):
                self._pool.append(driver.create())
        except VirtualMemoryError:
            self._give_back()
            raise
        self._mapped: list[list[Page]] = [[] for _ in range(slots)]
        self._needed = [0] * slots
        self._free: dict[int, None] = dict.fromkeys(reversed(range(slots)))  # in the order of freeing
        self._fences: list[Fence | None] = [None] * slots  # of each slot's last owner
        self._first = 0  # pages that the latest request began with
        self._eager = False  # whether the next request's slot may need pages

        self.seconds_mapping = 0.0  # in the driver's map and unmap, by anyone
        self.seconds_background = 0.0  # of these, in the background
        self.seconds_waited = 0.0  # by callers of `ensure`, for their turn

        self._queue, self._lock = threading.Lock(), threading.Lock()
        self._bell = threading.Condition()  # guards the four below
        self._wanted: dict[int, int] = {}  # pages by slot, to be mapped in the background
        self._rung = self._answered = 0
        self._closing = self._closed = False
        self._thread = threading.Thread(target=self._run, name="slot-pages", daemon=True)
        self._thread.start()

    @property
    def mapped(self) -> int:
        """Pages that are mapped, those ahead of need included."""
        with self._turn():
            return self.pages - len(self._pool)

    @property
    def available(self) -> int:
        """Pages that are not needed by slots in use."""
        with self._turn():
            return self.pages - sum(self._needed)

    def ensure(self, slot: int, pages: int) -> None:
        """Have the first `pages` pages of a slot mapped, which is in use from now on.

        Raises:
            KVFull: too few pages are left.
            VirtualMemoryError: the driver failed; the slot has and needs what it did before.
        """
        asked = perf_counter()
        with self._turn():
            self.seconds_waited += perf_counter() - asked
            self._require_open()
            missing = pages - len(self._mapped[slot])
            if missing > 0:
                self._make_room(slot, missing)
                self._map(slot, missing)
            self._needed[slot] = max(self._needed[slot], pages)
            starts = slot in self._free
            if starts:
                del self._free[slot]
                self._first, self._eager = pages, True
        if starts:
            self._ring()

    def prefetch(self, slot: int, pages: int) -> None:
        """Have the first `pages` pages of a slot mapped in the background, as far as pages are left.

        A slot that is not in use gets them only from those that no slot has, and leaves a tenth of all.
        """
        if pages > len(self._mapped[slot]):
            with self._bell:
                self._wanted[slot] = pages
            self._ring()

    def free(self, slot: int) -> None:
        """The slot needs nothing any more; it keeps its pages until others lack them.

        One that is not in use, because what should have grown it failed, is only the next one now.
        """
        with self._turn():
            self._require_open()
            if slot not in self._free:
                self._fences[slot] = self._driver.fence()
                self._needed[slot] = 0
            self._free.pop(slot, None)
            self._free[slot] = None
            with self._bell:
                self._wanted.pop(slot, None)
        self._ring()

    def next_slot(self) -> int | None:
        """The slot that pages are mapped in for the next request: the one freed last. None: all are in use."""
        with self._turn():
            return self._next_slot()

    def settle(self) -> None:
        """Wait until the background has done what it has been asked for so far, or has been closed."""
        with self._bell:
            target = self._rung
            self._bell.wait_for(lambda: self._answered >= target or self._closing)

    def close(self) -> None:
        """Stop the background and give all memory back, once the device is done with it. Closing twice does nothing."""
        with self._bell:
            self._closing = True
            self._bell.notify_all()
        self._thread.join()
        with self._turn():
            if self._closed:
                return
            if (fence := self._driver.fence()) is not None:
                fence.synchronize()
            for slot, mapped in enumerate(self._mapped):
                self._unmap(slot, len(mapped))
            self._give_back()
            self._closed = True

    # The rest runs with the turn held, but for `_run` and `_ring`.

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Exclusion, in the order of asking: one who maps page after page in the background cannot keep others out."""
        with self._queue:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _require_open(self) -> None:
        if self._closing:
            raise ValueError("the KV is closed")

    def _spare(self, slot: int) -> int:
        return len(self._mapped[slot]) - self._needed[slot]

    def _next_slot(self) -> int | None:
        return next(reversed(self._free), None)

    def _make_room(self, slot: int, pages: int) -> None:
        """Have `pages` pages in the pool: of slots freed longest ago, then those mapped ahead for slots in use."""
        others = [other for other in self._free if other != slot]
        others += [other for other in range(len(self._mapped)) if other not in self._free and other != slot]
        left = len(self._pool) + sum(map(self._spare, others))
        if pages > left:
            own = self._spare(slot)  # how many the background has mapped ahead is no part of the answer
            raise KVFull(
                f"slot {slot} lacks {pages + own} pages of {self._driver.page_bytes} bytes; {left + own} are left"
            )
        for other in others:
            self._unmap(other, min(self._spare(other), max(0, pages - len(self._pool))))

    def _map(self, slot: int, pages: int) -> None:
        mapped, taken = self._mapped[slot], self._pool[-pages:]
        self._timed(self._driver.map, self._address(slot, len(mapped)), taken)
        mapped += taken
        del self._pool[-pages:]

    def _unmap(self, slot: int, pages: int) -> None:
        """Take a slot's last pages back into the pool, once the device is done with the slot's last owner."""
        fence, mapped = self._fences[slot], self._mapped[slot]
        if pages and fence is not None:
            fence.synchronize()
            self._fences[slot] = None
        for _ in range(pages):
            self._timed(self._driver.unmap, self._address(slot, len(mapped) - 1))
            self._pool.append(mapped.pop())

    def _address(self, slot: int, page: int) -> int:
        return self.address + slot * self._slot_bytes + page * self._driver.page_bytes

    def _timed(self, call: Callable[..., None], *args: Any) -> None:
        started = perf_counter()
        try:
            call(*args)
        finally:
            seconds = perf_counter() - started
            self.seconds_mapping += seconds
            if threading.current_thread() is self._thread:
                self.seconds_background += seconds

    def _give_back(self) -> None:
        while self._pool:
            self._driver.release(self._pool[-1])
            self._pool.pop()
        self._driver.free(self.address, self._nbytes)

    # The background.

    def _ring(self) -> None:
        with self._bell:
            self._rung += 1
            self._bell.notify_all()

    def _run(self) -> None:
        self._driver.enter_thread()
        while True:
            with self._bell:
                self._bell.wait_for(lambda: self._rung > self._answered or self._closing)
                if self._closing:
                    return
                rung = self._rung
            try:
                while self._step():
                    pass
            except Exception:  # whoever needs the pages will try again, and be told
                log.exception("mapping KV pages ahead of need failed")
            with self._bell:
                self._answered = rung
                self._bell.notify_all()

    def _step(self) -> bool:
        """One turn's work of the background; False if nothing is left to do."""
        with self._turn():
            return not self._closing and (self._map_wanted() or self._refill_pool() or self._map_for_next())

    def _map_wanted(self) -> bool:
        with self._bell:
            if not self._wanted:
                return False
            slot = next(iter(self._wanted))
            pages = self._wanted.pop(slot)
        missing = pages - len(self._mapped[slot])
        in_use = slot not in self._free
        if missing > 0 and in_use and not self._pool:  # free slots do not take from each other: that would never end
            self._reclaim(missing, but=slot)
        now = min(missing, len(self._pool) - (0 if in_use else self._pool_goal), _MOST_AT_ONCE)
        if now > 0:
            self._map(slot, now)
            if now < missing:
                with self._bell:
                    self._wanted.setdefault(slot, pages)
        return True

    def _refill_pool(self) -> bool:
        return len(self._pool) < self._pool_goal and self._reclaim(1, but=self._next_slot())

    def _map_for_next(self) -> bool:
        """As many pages as the latest request began with, as far as the pool stays filled."""
        slot = self._next_slot()
        if not self._eager or slot is None:
            return False
        self._eager = False
        now = min(self._first - len(self._mapped[slot]), len(self._pool) - self._pool_goal, _MOST_AT_ONCE)
        if now > 0:
            self._map(slot, now)
            self._eager = True
        return self._eager

    @property
    def _pool_goal(self) -> int:
        return self.pages // _POOL_SHARE

    def _reclaim(self, pages: int, but: int | None) -> bool:
        """Unmap up to `pages` pages of the slot freed longest ago, of those that the device is done with."""
        for slot in self._free:
            fence = self._fences[slot]
            if slot != but and self._mapped[slot] and (fence is None or fence.query()):
                self._unmap(slot, min(pages, len(self._mapped[slot]), _MOST_AT_ONCE))
                return True
        return False
