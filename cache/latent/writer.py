"""The thread that does all writing to the store: nobody who draws a picture ever waits for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.latent.catalogue import Gone
from cache.latent.keys import KeySpace
from cache.latent.store import StoreError

_RETRY_S = 1.0  # before the store is tried again after it failed
_IDLE_S = 0.25  # between calls of `after` while nothing is to be written


@dataclass(slots=True, eq=False)
class Insert:
    """One entry to be written. A cancelled one is dropped, even if the store has it already."""

    space: KeySpace
    prompt: str
    embedding: NDArray[np.float32]  # [D], unit norm
    latents: Mapping[float, NDArray[np.float16]]  # alpha -> [C, h, w]
    cancelled: bool = False


class Writer:
    """Inserts wait in a queue of bounded length; removals, which free memory, in one without a bound, and go first.

    write, remove: called on the thread for each of them. An insert that raises is given up; a removal that raises
        StoreError is tried again after a second, before anything else is written.
    after: called on the thread after each of them, and several times a second while there are none.
    failed: told of each exception of the three.
    """

    def __init__(
        self,
        write: Callable[[Insert], None],
        remove: Callable[[Gone], None],
        after: Callable[[], None],
        failed: Callable[[Exception], None],
        limit: int,
    ) -> None:
        self._write, self._remove, self._after, self._failed = write, remove, after, failed
        self._limit = limit
        self._changed = threading.Condition()
        self._inserts: deque[Insert] = deque()
        self._removals: deque[Gone] = deque()
        self._current: Insert | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def insert(self, insert: Insert) -> bool:
        """False: the queue is full, or the writer closed."""
        with self._changed:
            if self._closing or len(self._inserts) >= self._limit:
                return False
            self._inserts.append(insert)
            self._changed.notify_all()
            return True

    def remove(self, gone: Sequence[Gone]) -> None:
        with self._changed:
            self._removals.extend(gone)
            self._changed.notify_all()

    def cancel(self, tenant: str, prompt: str | None) -> None:
        """Cancels a tenant's inserts that are not finished, of one prompt or (None) all."""
        with self._changed:
            for insert in [*self._inserts, *([self._current] if self._current else [])]:
                if insert.space.tenant == tenant and prompt in (None, insert.prompt):
                    insert.cancelled = True

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was asked for is done; False if it was not in time."""
        with self._changed:
            return self._changed.wait_for(self._is_done, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Takes no more inserts, does what waits and ends the thread; False if it is still at it after the timeout.

        Then what waits is given up, and the thread ends with the call that it is in.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            self._give_up()
        return not self._thread.is_alive()

    def _is_done(self) -> bool:
        return not self._inserts and not self._removals and self._current is None

    def _give_up(self) -> None:
        self._inserts.clear()
        self._removals.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or not self._is_done(), _IDLE_S)
                if self._closing and self._is_done():
                    return
                removal = self._removals[0] if self._removals else None
                if removal is None and self._inserts:
                    self._current = self._inserts.popleft()
            failure = self._perform(removal)
            with self._changed:
                self._current = None
                if removal is not None and self._removals and not isinstance(failure, StoreError):
                    self._removals.popleft()
                self._changed.notify_all()
                if failure is not None and self._changed.wait_for(lambda: self._closing, _RETRY_S):
                    self._give_up()  # closing, with a store that fails
                    self._changed.notify_all()

    def _perform(self, removal: Gone | None) -> Exception | None:
        try:
            if removal is not None:
                self._remove(removal)
            elif self._current is not None:
                self._write(self._current)
            self._after()
        except Exception as error:
            self._failed(error)
            return error
        return None
