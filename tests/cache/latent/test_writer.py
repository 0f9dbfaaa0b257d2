from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from cache.latent import writer as module
from cache.latent.catalogue import Gone
from cache.latent.keys import KeySpace
from cache.latent.store import StoreError
from cache.latent.writer import Insert, Writer

SPACE = KeySpace("alice", "shapes@1", "linear", (), (4, 8, 8), 7.5, "")


def insert(prompt: str) -> Insert:
    return Insert(SPACE, prompt, np.ones(1, np.float32), {})


class Log:
    """What the writer did, and what befalls it."""

    def __init__(self) -> None:
        self.done: list[str | Gone] = []
        self.errors: list[Exception] = []
        self.raised: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()

    def write(self, insert: Insert) -> None:
        self.gate.wait()
        self.remove_or_write(insert.prompt)

    def remove_or_write(self, what: str | Gone) -> None:
        if self.raised:
            raise self.raised.pop()
        self.done.append(what)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def start(log: Log, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Writer]]:
    monkeypatch.setattr(module, "_RETRY_S", 0.05)
    writers: list[Writer] = []

    def build(limit: int = 10) -> Writer:
        writers.append(Writer(log.write, log.remove_or_write, lambda: None, log.errors.append, limit))
        writers[-1].start()
        return writers[-1]

    yield build
    log.gate.set()
    for writer in writers:
        assert writer.close(5.0)


def test_removals_go_before_inserts(log: Log, start: Callable[[int], Writer]) -> None:
    log.gate.clear()
    writer = start(10)
    writer.insert(insert("first"))
    while not writer._current:
        time.sleep(0.001)
    writer.insert(insert("second"))
    writer.remove([(1, None), (2, 0.5)])
    log.gate.set()
    assert writer.flush(5.0)
    assert log.done == ["first", (1, None), (2, 0.5), "second"]


def test_a_removal_that_fails_is_tried_again_an_insert_is_not(log: Log, start: Callable[[int], Writer]) -> None:
    writer = start(10)
    log.raised = [StoreError("gone"), StoreError("gone"), StoreError("gone")]
    writer.remove([(1, None)])
    assert writer.flush(5.0)
    log.raised = [StoreError("gone")]
    writer.insert(insert("lost"))
    writer.insert(insert("kept"))
    assert writer.flush(5.0)
    assert log.done == [(1, None), "kept"]
    assert len(log.errors) == 4


def test_what_is_not_the_stores_fault_does_not_end_the_thread_or_come_again(
    log: Log, start: Callable[[int], Writer]
) -> None:
    writer = start(10)
    log.raised = [KeyError("a slip"), ValueError("another")]
    writer.remove([(1, None)])
    writer.insert(insert("lost"))
    writer.insert(insert("kept"))
    assert writer.flush(5.0)
    assert log.done == ["kept"]


def test_who_waits_for_an_insert_that_fails_does_not_wait_for_the_next_attempt(
    log: Log, start: Callable[[int], Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 5.0)
    writer = start(10)
    log.raised = [StoreError("gone")]
    writer.insert(insert("lost"))
    began = time.monotonic()
    assert writer.flush(10.0)
    assert time.monotonic() - began < 4.0


def test_closing_writes_what_waits(log: Log, start: Callable[[int], Writer]) -> None:
    writer = start(10)
    for i in range(5):
        assert writer.insert(insert(str(i)))
    assert writer.close(5.0)
    assert log.done == ["0", "1", "2", "3", "4"]
    assert not writer.insert(insert("late"))


def test_closing_does_not_wait_for_a_store_that_fails(log: Log, start: Callable[[int], Writer]) -> None:
    writer = start(10)
    log.raised = [StoreError("gone") for _ in range(1000)]
    writer.remove([(1, None)])
    assert writer.close(5.0)
    assert writer.flush(0.0)
    assert log.done == []
    log.raised.clear()


def test_cancelling_reaches_one_tenant_and_prompt(log: Log, start: Callable[[int], Writer]) -> None:
    log.gate.clear()
    writer = start(10)
    inserts = [insert("a"), insert("a"), insert("b")]
    for each in inserts:
        writer.insert(each)
    writer.cancel("bob", None)
    assert [each.cancelled for each in inserts] == [False, False, False]
    writer.cancel("alice", "a")
    assert [each.cancelled for each in inserts] == [True, True, False]
    writer.cancel("alice", None)
    assert [each.cancelled for each in inserts] == [True, True, True]
