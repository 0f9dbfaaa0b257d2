"""The language model of a process: the memory it is given, when it is loaded, and its engine behind the bridge."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from accel.memory.budget import DeviceMemory, Needs
from accel.memory.paged_kv import page_bytes
from models.errors import ModelError
from models.llm.loading import LanguageModel
from service.config import LlmSettings, ModelSettings, Settings
from service.errors import BusyError, InputError, SetupError, UnavailableError
from service.events import Cancelled, Event
from service.llm.request import ChoiceEnded, Completed, Delta, LlmRequest, SamplingParams
from service.runtime import _language_model
from service.writer import DEVICE_PAGE, WORKING_SHARE, kv_plan, open_writer, wanted
from tests.service.test_bridge import events_of, until
from tests.service.texts import tiny_writer

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny_writer(tmp_path_factory.mktemp("llm"))


def ask(id: str, tokens: int = 20, max_tokens: int = 60, **others: int | str) -> LlmRequest:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=max_tokens, logprobs=1)
    return LlmRequest(id=id, tokens=tuple(range(3, 3 + tokens)), params=params, **others)  # type: ignore[arg-type]


def test_a_slow_reader_holds_one_piece_of_each_choice_and_misses_none(model: LanguageModel) -> None:
    async def run() -> None:
        writer = open_writer(model, LlmSettings(max_running=4))
        writer.bridge.start()
        read = await events_of(writer.bridge.submit(ask("read", n=2)))
        slow = writer.bridge.submit(ask("slow", n=2))
        await until(lambda: writer.bridge.stats == (0, 0))
        assert len(slow._mailbox._events) == 6  # Started, two Deltas, two ends, Completed
        late = await events_of(slow)
        await writer.close(0.0)

        def said(events: list[Event]) -> list[object]:
            deltas = [event for event in events if isinstance(event, Delta)]
            of = [[delta for delta in deltas if delta.choice == choice] for choice in (0, 1)]
            return [
                (
                    "".join(d.text for d in each),
                    [t for d in each for t in d.tokens],
                    [p for d in each for p in d.logprobs],
                )
                for each in of
            ]

        assert said(late) == said(read)
        assert len([event for event in read if isinstance(event, Delta)]) > 20
        assert isinstance(late[-1], Completed)
        order = [type(event) for event in late]
        assert order.index(ChoiceEnded) > 1

    asyncio.run(run())


def test_answers_take_places_and_go_when_their_reader_does(model: LanguageModel) -> None:
    async def run() -> None:
        writer = open_writer(model, LlmSettings(max_running=1, max_waiting=3))
        bridge = writer.bridge
        bridge.start()
        running = bridge.submit(ask("running", max_tokens=100))
        await until(lambda: bridge.stats.running == 1)
        waiting = [bridge.submit(ask(str(index), max_tokens=5)) for index in range(3)]
        with pytest.raises(BusyError, match="at most 3 answers wait"):
            bridge.submit(ask("refused"))
        await running.aclose()
        ends = [(await events_of(stream))[-1] for stream in waiting]
        assert all(isinstance(end, Completed) for end in ends)
        cancelled = bridge.submit(ask("cancelled", max_tokens=100))
        cancelled.cancel()
        assert isinstance((await events_of(cancelled))[-1], Cancelled)
        assert writer.figures.pages_used == 0
        await writer.close(0.0)
        with pytest.raises(UnavailableError):
            bridge.submit(ask("late"))

    asyncio.run(run())


def test_room_outlives_the_beginning_of_a_shutdown(model: LanguageModel) -> None:
    """A request that is being made ready, by a rewriting say, is as good as accepted."""

    async def run() -> None:
        writer = open_writer(model, LlmSettings())
        bridge = writer.bridge
        bridge.start()
        with bridge.room(1) as room:
            closing = asyncio.create_task(writer.close(20.0))
            await asyncio.sleep(0.05)
            assert not bridge.ready
            with pytest.raises(UnavailableError):
                bridge.submit(ask("newcomer"))
            stream = bridge.submit(ask("accepted", max_tokens=3), room)
        assert isinstance((await events_of(stream))[-1], Completed)
        await closing
        assert bridge.ended

    asyncio.run(run())


def test_closing_a_writer_gives_virtual_memory_back(model: LanguageModel) -> None:
    before = set(threading.enumerate())

    async def run() -> None:
        writer = open_writer(model, LlmSettings(kv_backend="virtual", max_running=2))
        writer.bridge.start()
        assert isinstance((await events_of(writer.bridge.submit(ask("a"))))[-1], Completed)
        virtual = writer._assembly.virtual
        assert virtual is not None
        assert {thread.name for thread in set(threading.enumerate()) - before} == {"llm", "slot-pages"}
        await writer.close(0.0)
        with pytest.raises(ValueError, match="closed"):
            virtual.grow(0, 1)

    asyncio.run(run())
    assert set(threading.enumerate()) <= before


def test_requests_that_could_never_run_are_told_before_they_are_queued(model: LanguageModel) -> None:
    writer = open_writer(model, LlmSettings(kv_pages=2, max_running=3))
    assert writer.longest == 32
    writer.check(ask("fits", 20, 12))
    for request, param in ((ask("a", 32, 1), "prompt"), (ask("b", 20, 13), "max_tokens"), (ask("c", 2, 2, n=4), "n")):
        with pytest.raises(InputError) as caught:
            writer.check(request)
        assert caught.value.param == param


def test_keys_and_values_on_a_cpu_are_a_number_of_pages(model: LanguageModel) -> None:
    one = page_bytes(2, 16, 2, 16, model.decoder.dtype)
    assert kv_plan(model, LlmSettings(), None, Needs()).budget_bytes == 32 * 8 * one  # all that 32 sequences can use
    assert kv_plan(model, LlmSettings(kv_pages=5), None, Needs()).budget_bytes == 5 * one
    virtual = kv_plan(model, LlmSettings(kv_pages=5, kv_backend="virtual", max_running=3), None, Needs())
    assert (virtual.kind, virtual.budget_bytes) == ("virtual", 5 * one + 3 * DEVICE_PAGE)


def test_keys_and_values_on_a_gpu_are_what_the_others_leave(model: LanguageModel) -> None:
    one = page_bytes(2, 16, 2, 16, model.decoder.dtype)
    memory, needs = DeviceMemory(total=8 * GIB, free=7 * GIB), Needs(weights=5 * GIB, latents=GIB)
    settings = LlmSettings(max_running=1024, gpu_memory_fraction=0.8)
    working = int(WORKING_SHARE * 0.8 * memory.total)
    left = int(0.8 * memory.total) - 6 * GIB - working
    assert left < 0
    with pytest.raises(SetupError, match=r"gpu_memory_fraction: 0.8 of 8.00 GiB, 7.00 GiB of it free, is too little"):
        kv_plan(model, settings, memory, needs)
    small = Needs(weights=5 * GIB - (GIB >> 4))
    tight = kv_plan(model, settings, memory, small)
    room = int(0.8 * memory.total) - small.weights - working
    assert tight.budget_bytes == min(room // one, 1024 * 8) * one
    assert kv_plan(model, replace(settings, max_running=2), memory, small).budget_bytes == 2 * 8 * one


def test_memory_that_there_is_not_is_told_with_the_setting(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*ignored: object, **also_ignored: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes")

    monkeypatch.setattr("service.llm.assembly.PagedKV", refuse)
    with pytest.raises(SetupError, match=r"out of memory in reserving 0.0 GB for keys and values; --kv-pages"):
        open_writer(model, LlmSettings())


@pytest.mark.parametrize(
    ("enabled", "model", "expected"),
    [("auto", "default", False), ("on", "default", True), ("off", "default", False), ("auto", "./mine", True)],
)
def test_a_language_model_is_wanted_where_it_has_been_fetched(
    tmp_path: Path, enabled: str, model: str, expected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = Settings(model=ModelSettings(cache_dir=tmp_path), llm=LlmSettings(enabled=enabled, model=model))
    assert wanted(settings) is expected
    assert ("headstart models pull smollm2" in caplog.text) == (enabled == "auto" and model == "default")
    here = Settings(llm=LlmSettings(enabled=enabled, model=model))
    assert wanted(here) is (enabled != "off")  # the bundle has been fetched for the tests


def test_one_that_cannot_be_loaded_is_left_out_unless_it_was_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    auto = Settings(llm=LlmSettings(model=str(tmp_path / "empty")))
    assert wanted(auto)
    assert _language_model(auto) is None
    assert "no language model: " in caplog.text
    assert str(tmp_path / "empty") in caplog.text
    with pytest.raises(ModelError):
        _language_model(replace(auto, llm=replace(auto.llm, enabled="on")))
