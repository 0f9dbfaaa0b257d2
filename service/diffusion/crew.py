"""The follower processes of rank 0 and the watch over them.

Each follower has two pipes: orders and answers go through one, and through the other it beats and says why it can do
no more. A thread listens to the beats. A group is lost as a whole: whatever happens to one follower, all are ended, so
that nothing waits for a collective call that cannot come about.

Followers on the CPU are forked from a server process that has imported what they need (multiprocessing's forkserver),
so that starting them again takes no imports. Those on GPUs are new interpreters: diffusers asks for CUDA devices as it
is imported, after which a fork of the process cannot use them.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from service.diffusion import follower
from service.diffusion.orders import Answer, Order, degrees_of
from service.errors import OutOfMemoryError, UnavailableError

log = logging.getLogger(__name__)

IMPORT_S = 240.0  # until a follower is first heard of, beyond the time that its silence may last
LEAVE_S = 5.0  # that followers get to end by themselves
BEATS = 4  # in the time after which silence counts as the end
PRELOAD = [
    "service.diffusion.follower",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip",
    "transformers.models.bert.modeling_bert",
]


class RankError(UnavailableError):
    """A follower died, hangs or failed, and what ran on it is lost."""

    code = "rank_lost"


class Follower(NamedTuple):
    rank: int
    process: Any  # multiprocessing's
    orders: Connection
    pulse: Connection


def prepare() -> None:
    """Let the server process of followers on the CPU begin its imports, so that they run beside the caller's own."""
    from multiprocessing.forkserver import ensure_running

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    ensure_running()


class Crew:
    """Followers 1 to `gpus` - 1, started and watched until they are lost or closed.

    Args:
        on_gpus: they are to use GPUs.
        timeout_s: a follower that is silent for so long has died.
        step_s: a `watched` block that takes longer hangs.
        settle: waits until what other ranks have finished is there; called before followers without memory are ended.
        abort: unblocks this process from collective calls on its device; called when the followers are ended.
        on_lost: called, from the watching thread or the caller's, when the group is lost.
    """

    def __init__(
        self,
        gpus: int,
        on_gpus: bool,
        timeout_s: float,
        step_s: float,
        *,
        settle: Callable[[], None],
        abort: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.lost: UnavailableError | None = None
        self._timeout_s, self._step_s = timeout_s, step_s
        self._settle, self._abort, self._on_lost = settle, abort, on_lost
        self._lock = threading.Lock()
        self._closing = False
        self._since: float | None = None  # when the watched block began
        if not on_gpus:
            prepare()
        context = multiprocessing.get_context("spawn" if on_gpus else "forkserver")
        self._followers = _start(context, gpus, timeout_s / BEATS)
        atexit.register(self.close)  # before multiprocessing's own, which would wait for them
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    @property
    def pipes(self) -> dict[int, Connection]:
        """Through which followers get their orders, by rank."""
        return {each.rank: each.orders for each in self._followers}

    @property
    def pids(self) -> list[int]:
        return [each.process.pid for each in self._followers]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around work that may wait for other ranks, on this host or its device."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def tell(self, orders: Mapping[int, Order]) -> None:
        """Send followers an order each. Raises UnavailableError if the group is lost."""
        pipes = self.pipes
        try:
            for rank, order in orders.items():
                pipes[rank].send(order)
        except OSError as error:
            raise self.failed("a follower cannot be reached") from error

    def answers(self, ranks: Iterable[int]) -> list[Answer]:
        """These followers' answers to their last orders. Raises UnavailableError if the group is lost."""
        pipes = self.pipes
        try:
            return [pipes[rank].recv() for rank in ranks]
        except (OSError, EOFError) as error:
            raise self.failed("a follower does not answer") from error

    def failed(self, reason: str, *, no_memory: bool = False) -> UnavailableError:
        """Why this process can no longer work with the group, which is lost from here on at the latest.

        If a follower is at the bottom of it, the watching thread knows more, in a moment.
        """
        if not no_memory:
            self._thread.join(1.0)
        return self._lose(reason, no_memory)

    def close(self) -> None:
        """End the followers, and wait until they are gone. Once."""
        if self._closing:
            return
        self._closing = True
        atexit.unregister(self.close)
        for each in self._followers:
            each.orders.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        end = time.monotonic() + (0.0 if self.lost else LEAVE_S)
        for each in self._followers:
            each.process.join(max(0.0, end - time.monotonic()))
            each.process.kill()
            each.process.join()
            each.process.close()
            each.pulse.close()

    def _watch(self) -> None:
        ranks = {each.pulse: each.rank for each in self._followers}
        heard = dict.fromkeys(ranks, time.monotonic() + IMPORT_S)
        while not self._closing and self.lost is None:
            ready = wait(list(heard), self._timeout_s / BEATS)
            now = time.monotonic()
            for pulse, rank in ranks.items():
                if pulse in ready:
                    heard[pulse] = now
                    self._listen(pulse, rank)
                elif now - heard[pulse] > self._timeout_s:
                    self._lose(f"rank {rank} has not been heard of for {self._timeout_s:g} s")
            since = self._since
            if since is not None and now - since > self._step_s:
                self._lose(f"a step took more than {self._step_s:g} s")

    def _listen(self, pulse: Connection, rank: int) -> None:
        try:
            words: Answer | None = pulse.recv()
        except (OSError, EOFError):
            words = Answer("has died")
        if words is not None and not self._closing:
            self._lose(f"rank {rank}: {words.fault}", words.no_memory)

    def _lose(self, reason: str, no_memory: bool = False) -> UnavailableError:
        with self._lock:
            if self.lost is None:
                log.error("the group of ranks is lost: %s", reason)
                if no_memory:
                    self._settle()
                kind = OutOfMemoryError if no_memory else RankError
                self.lost = kind(f"the group of GPUs was lost ({reason}) and is started anew; try again")
                for each in self._followers:
                    each.process.kill()
                self._abort()
                self._on_lost()
            return self.lost


def _start(context: Any, gpus: int, beat_s: float) -> list[Follower]:
    leaders: dict[int, dict[int, Connection]] = {rank: {} for rank in range(1, gpus)}
    members: dict[int, dict[int, Connection]] = {rank: {} for rank in range(1, gpus)}
    for degree in degrees_of(gpus):
        for rank in range(degree, gpus // degree * degree):
            leader = rank // degree * degree
            if leader != rank and leader not in leaders[rank]:
                leaders[rank][leader], members[leader][rank] = context.Pipe(duplex=False)
    started = []
    for rank in range(1, gpus):
        orders, its_orders = context.Pipe()
        pulse, its_pulse = context.Pipe()
        process = context.Process(
            target=follower.main,
            args=(its_orders, its_pulse, beat_s, leaders[rank], members[rank]),
            name=f"headstart-rank-{rank}",
            daemon=True,
        )
        process.start()
        for end in (its_orders, its_pulse, *leaders[rank].values(), *members[rank].values()):
            end.close()
        started.append(Follower(rank, process, orders, pulse))
    return started
