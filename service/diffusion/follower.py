"""A follower's process: it loads the model, joins the group, and does its part of every network call."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection

import torch
from torch._C._distributed_c10d import TCPStore

from models.diffusion.loaded import LoadedModel
from models.diffusion.model import Condition
from service.diffusion.orders import Answer, Decode, Evaluate, Load, Meet, Order, blank
from service.diffusion.shares import BrokenError, Seat
from service.errors import OutOfMemoryError
from service.faults import explained
from service.loading import load_chosen


def main(
    orders: Connection,
    pulse: Connection,
    beat_s: float,
    leaders: Mapping[int, Connection],
    members: Mapping[int, Connection],
) -> None:
    """Obey orders until their pipe ends, which it does with the process at its other end, however that ends.

    Args:
        pulse: a None is sent through it every `beat_s` seconds, and an Answer where this rank can do no more.
        leaders, members: pipes from and to other followers (see `Seat`).
    """
    for each in (signal.SIGINT, signal.SIGTERM):  # a terminal and a service manager signal all processes at once
        signal.signal(each, signal.SIG_IGN)
    lock = threading.Lock()
    threading.Thread(target=_beat, args=(pulse, lock, beat_s), daemon=True).start()
    try:
        Follower(orders, {0: orders} | dict(leaders), members).obey()
    except EOFError:
        os._exit(0)  # without the library's own end, which waits for other ranks
    except BaseException as error:
        with lock:
            pulse.send(_last_words(error))
        threading.Event().wait()  # rank 0 ends this process when what ran before is done on the device


def _beat(pulse: Connection, lock: threading.Lock, beat_s: float) -> None:
    try:
        while not pulse.poll(beat_s):  # nothing is ever sent this way: what can be read is the end
            with lock:
                pulse.send(None)
    finally:
        os._exit(0)


class Follower:
    def __init__(
        self, orders: Connection, leaders: Mapping[int, Connection], members: Mapping[int, Connection]
    ) -> None:
        self._orders, self._leaders, self._members = orders, leaders, members
        self._conditions: dict[int, Condition] = {}
        self._model: LoadedModel
        self._seat: Seat

    @torch.inference_mode()
    def obey(self) -> None:
        """Runs until EOFError: rank 0 has closed the pipe."""
        while True:
            order: Order = self._orders.recv()
            match order:
                case Load():
                    self._orders.send(self._load(order))
                case Meet():
                    store = TCPStore("127.0.0.1", order.port, is_master=False)
                    self._seat = Seat(self._model, order, store, self._leaders, self._members)
                    self._orders.send(Answer())
                case Evaluate():
                    self._evaluate(order)
                case Decode(degree):
                    self._seat.decode(degree, torch.empty(0))
                    self._orders.send(Answer())

    def _load(self, order: Load) -> Answer:
        chosen = order.model
        torch.set_num_threads(order.threads)
        try:
            self._model = load_chosen(chosen)
        except Exception as error:
            return _answer(error, f"loading the model on {chosen.device}")
        return Answer()

    def _evaluate(self, order: Evaluate) -> None:
        for number in order.forget:
            del self._conditions[number]
        fresh = {lesson.number: blank(lesson, self._model.device) for lesson in order.lessons}
        self._seat.spread(list(fresh.values()))
        self._conditions |= fresh
        channels, height, width = order.shape
        packed = torch.empty(0 if order.alone else order.rows, channels * height * width + 2, device=self._model.device)
        part, error = self._seat.evaluate(order, packed, [self._conditions[number] for number in order.conditions])
        answer = Answer() if error is None else _answer(error, "a denoising step")
        self._orders.send(answer._replace(conditions=len(self._conditions)))
        if not order.alone:
            self._seat.gather(order, part)


def _answer(error: Exception, doing: str) -> Answer:
    """Raises what the device itself did, which ends this rank."""
    reason = explained(error, doing)
    return Answer(reason.message, isinstance(reason, OutOfMemoryError))


def _last_words(error: BaseException) -> Answer:
    cause = error.cause if isinstance(error, BrokenError) else error
    try:
        return _answer(cause, "a denoising step") if isinstance(cause, Exception) else Answer(type(cause).__name__)
    except Exception as fault:
        return Answer(f"failed: {type(fault).__name__}")
