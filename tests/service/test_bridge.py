"""The bridge between threads: on the toy model's engine, and on engines that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from service.bridge import Bridge, RequestStream
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import Completed, Event, Image, Progress, Timings
from service.errors import BusyError, ConflictError, HeadstartError, UnavailableError
from service.events import Cancelled, Failed, Started
from tests.service.diffusion.toy import ToyModel, request, settings

TERMINAL = (Completed, Failed, Cancelled)


def on_bridge(
    body: Callable[[Bridge, ToyModel], Awaitable[None]], model: ToyModel | None = None, **changes: int | float
) -> Bridge:
    """Run `body` on a started bridge, which is then closed and must have ended its thread."""
    model = model or ToyModel()
    limits = settings(**changes)

    async def run() -> Bridge:
        bridge = Bridge(DiffusionEngine(model, limits), limits)
        bridge.start()
        try:
            await asyncio.wait_for(body(bridge, model), 60)
        finally:
            await bridge.close(0.0)
        assert not bridge._thread.is_alive()
        return bridge

    return asyncio.run(run())


async def events_of(stream: RequestStream) -> list[Event]:
    return [event async for event in stream]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


class Gate:
    """Holds the model's network until opened."""

    def __init__(self, model: ToyModel) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        model.on_call = self._wait

    def _wait(self, network: str, conditions: object) -> None:
        self.reached.set()
        assert self._open.wait(20)

    def open(self) -> None:
        self._open.set()


def test_a_stream_ends_after_its_terminal_event():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        stream = bridge.submit(request(n=2))
        events = await events_of(stream)
        assert isinstance(events[0], Started)
        assert len([event for event in events if isinstance(event, Image)]) == 2
        assert [event for event in events if isinstance(event, TERMINAL)] == [events[-1]]
        assert isinstance(events[-1], Completed)
        assert await events_of(stream) == []
        stream.cancel()
        await stream.aclose()
        assert bridge.stats == (0, 0)

    on_bridge(body)


def test_many_requests_at_once():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        streams = [bridge.submit(request(str(i), steps=3 + i % 5)) for i in range(40)]
        ends = [events[-1] for events in await asyncio.gather(*map(events_of, streams))]
        assert all(isinstance(end, Completed) for end in ends)
        assert max(model.calls) == 8

    on_bridge(body)


def test_more_than_max_waiting_pictures_are_refused_with_a_time_to_come_back():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        assert isinstance((await events_of(bridge.submit(request("first"))))[-1], Completed)
        model.on_call = lambda network, conditions: time.sleep(0.02)
        running = bridge.submit(request("running", n=2, steps=200))
        await until(lambda: bridge.stats.running == 1)
        waiting = bridge.submit(request("waiting", n=3))
        assert bridge.stats == (1, 1)
        with pytest.raises(BusyError, match="at most 4 pictures") as caught:
            bridge.submit(request("refused", n=2))
        assert caught.value.retry_after >= 1
        last = bridge.submit(request("fits", n=1))
        running.cancel()
        assert isinstance((await events_of(running))[-1], Cancelled)
        for stream in (waiting, last):
            assert isinstance((await events_of(stream))[-1], Completed)
        assert isinstance((await events_of(bridge.submit(request("refused", n=2))))[-1], Completed)

    on_bridge(body, max_waiting=4, max_running=2)


def test_room_is_kept_for_a_request_and_given_back_without_one():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        with bridge.room(3) as room:
            with pytest.raises(BusyError), bridge.room(2):
                pass
            with pytest.raises(BusyError):
                bridge.submit(request("refused", n=2))
            stream = bridge.submit(request("accepted", n=3, steps=2), room)
            assert bridge.stats == (0, 1)
        assert isinstance((await events_of(stream))[-1], Completed)
        with pytest.raises(ZeroDivisionError), bridge.room(4):
            1 / 0  # noqa: B018
        for _ in range(2):
            assert isinstance((await events_of(bridge.submit(request("all", n=4, steps=1))))[-1], Completed)

    on_bridge(body, max_waiting=4)


def test_room_in_a_bridge_that_closes_leads_nowhere():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        with bridge.room(1) as room:
            await bridge.close(0)
            with pytest.raises(UnavailableError):
                bridge.submit(request(), room)
        with pytest.raises(UnavailableError), bridge.room(1):
            pass

    on_bridge(body)


def test_retry_after_grows_with_the_time_a_picture_takes():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        model.on_call = lambda network, conditions: time.sleep(0.3)
        await events_of(bridge.submit(request("first", steps=1)))
        model.on_call = lambda network, conditions: time.sleep(0.02)
        running = bridge.submit(request("running", steps=200))
        await until(lambda: bridge.stats.running == 1)
        waiting = bridge.submit(request("waiting", n=8))
        with pytest.raises(BusyError) as caught:
            bridge.submit(request("refused", n=8))
        assert 3 <= caught.value.retry_after <= 10  # eight pictures must start before these, at 0.3 s each
        await running.aclose()
        await waiting.aclose()

    on_bridge(body, max_waiting=8, max_running=1)


def test_the_id_of_a_live_request_is_refused_and_free_afterwards():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        stream = bridge.submit(request())
        with pytest.raises(ConflictError):
            bridge.submit(request())
        assert isinstance((await events_of(stream))[-1], Completed)
        assert isinstance((await events_of(bridge.submit(request())))[-1], Completed)

    on_bridge(body)


def test_cancel_ends_the_stream_with_cancelled():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        stream = bridge.submit(request(steps=200))
        async for event in stream:
            if isinstance(event, Progress):
                stream.cancel()
                break
        assert isinstance((await events_of(stream))[-1], Cancelled)
        assert model.evaluations < 200

    on_bridge(body)


async def _close(stream: RequestStream) -> None:
    await stream.aclose()
    assert await events_of(stream) == []


async def _leave_context(stream: RequestStream) -> None:
    with pytest.raises(KeyError):
        async with stream:
            raise KeyError


async def _cancel_reader(stream: RequestStream) -> None:
    reader = asyncio.create_task(events_of(stream))
    await asyncio.sleep(0)
    reader.cancel()


async def _drop(stream: RequestStream) -> None:
    pass


@pytest.mark.parametrize("leave", [_close, _leave_context, _cancel_reader, _drop])
def test_a_reader_that_goes_away_aborts_its_request(leave):
    async def body(bridge: Bridge, model: ToyModel) -> None:
        gate = Gate(model)
        await leave(bridge.submit(request(steps=200)))
        await asyncio.sleep(0)
        gc.collect()
        gate.open()
        await until(lambda: bridge.stats == (0, 0))
        assert model.evaluations < 200

    on_bridge(body)


def test_a_stream_left_unread_does_not_abort_a_later_request_of_the_same_id():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        old = bridge.submit(request())
        await until(lambda: bridge.stats == (0, 0))
        new = bridge.submit(request(steps=50))
        await old.aclose()
        assert isinstance((await events_of(new))[-1], Completed)

    on_bridge(body)


def test_a_slow_reader_keeps_the_latest_progress_and_every_image():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        stream = bridge.submit(request(n=3, steps=150, partial_images=2))
        await until(lambda: bridge.stats == (0, 0))
        assert len(stream._mailbox._events) == 1 + 3 + 3 * 2 + 3 + 1
        events = await events_of(stream)
        progress = [event for event in events if isinstance(event, Progress)]
        assert progress == [Progress("a", index, 150, 150) for index in range(3)]
        assert len([event for event in events if isinstance(event, Image)]) == 3
        assert isinstance(events[0], Started)
        assert isinstance(events[-1], Completed)

    on_bridge(body)


def test_an_idle_engine_thread_sleeps():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        await events_of(bridge.submit(request()))
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.1

    on_bridge(body)


def test_storms_of_submissions_and_cancellations():
    rng = random.Random(3)

    async def client(bridge: Bridge, name: int, ends: list[str]) -> None:
        for turn in range(12):
            try:
                stream = bridge.submit(request(f"{name}-{turn}", n=rng.randint(1, 3), steps=rng.randint(1, 12)))
            except BusyError:
                ends.append("busy")
                await asyncio.sleep(0.005)
                continue
            patience = rng.choice([0, 1, 3, 1000])
            leave = rng.random() < 0.3
            end = "left"
            async for event in stream:
                patience -= 1
                if isinstance(event, TERMINAL):
                    end = type(event).__name__
                elif patience == 0 and leave:
                    await stream.aclose()
                elif patience == 0:
                    stream.cancel()
            ends.append(end)

    async def body(bridge: Bridge, model: ToyModel) -> None:
        ends: list[str] = []
        await asyncio.gather(*(client(bridge, name, ends) for name in range(24)))
        assert len(ends) == 24 * 12
        assert set(ends) == {"busy", "left", "Completed", "Cancelled"}
        await until(lambda: bridge.stats == (0, 0))
        assert isinstance((await events_of(bridge.submit(request("after", n=8))))[-1], Completed)

    on_bridge(body, max_waiting=20, max_running=6, max_batch=4)


def test_close_lets_accepted_requests_finish_within_the_grace():
    async def run() -> None:
        limits = settings(max_running=2)
        bridge = Bridge(DiffusionEngine(ToyModel(), limits), limits)
        bridge.start()
        readers = [asyncio.create_task(events_of(bridge.submit(request(str(i), n=2)))) for i in range(6)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(bridge.close(30.0))
        await asyncio.sleep(0)
        assert not bridge.ready
        with pytest.raises(UnavailableError):
            bridge.submit(request("late"))
        assert all(isinstance(events[-1], Completed) for events in await asyncio.gather(*readers))
        await closing
        assert not bridge._thread.is_alive()

    asyncio.run(run())


def test_close_cancels_what_outlasts_the_grace():
    async def run() -> None:
        model = ToyModel()
        model.on_call = lambda network, conditions: time.sleep(0.02)
        limits = settings(max_running=2)
        bridge = Bridge(DiffusionEngine(model, limits), limits)
        bridge.start()
        readers = [asyncio.create_task(events_of(bridge.submit(request(str(i), n=2, steps=200)))) for i in range(3)]
        await until(lambda: bridge.stats.running > 0)
        await bridge.close(0.1)
        assert all(isinstance(events[-1], Cancelled) for events in await asyncio.gather(*readers))
        assert not bridge._thread.is_alive()

    asyncio.run(run())


def test_close_does_not_wait_for_ever_for_a_tick_that_hangs(monkeypatch):
    monkeypatch.setattr("service.bridge.ABORT_S", 0.1)

    async def run() -> None:
        model = ToyModel()
        gate = Gate(model)
        bridge = Bridge(DiffusionEngine(model, settings()), settings())
        bridge.start()
        stream = bridge.submit(request())
        await until(gate.reached.is_set)
        await asyncio.wait_for(bridge.close(0.1), 5)
        assert isinstance((await events_of(stream))[-1], Cancelled)
        gate.open()
        await asyncio.to_thread(bridge._thread.join, 10)
        assert not bridge._thread.is_alive()

    asyncio.run(run())


class BrokenEngine:
    """Steps twice, then dies."""

    def __init__(self, *, fails: bool) -> None:
        self.live: list[str] = []
        self.steps = 0
        self.fails = fails

    def add(self, request) -> None:
        if request.id == "unwelcome":
            raise ValueError("private")
        self.live.append(request.id)

    def abort(self, request_id: str) -> None: ...

    def has_work(self) -> bool:
        return bool(self.live)

    def step(self) -> list[Event]:
        self.steps += 1
        if self.steps > 2:
            raise RuntimeError("the device fell off the bus")
        return [Progress(id, 0, self.steps, 9) for id in self.live]

    def fail_all(self, error: HeadstartError) -> list[Event]:
        if self.fails:
            raise RuntimeError("and this fails too")
        return [Failed(id, error, Timings()) for id in self.live]


@pytest.mark.parametrize("fails", [False, True])
def test_the_death_of_the_thread_fails_every_open_stream(fails):
    async def run() -> None:
        bridge = Bridge(BrokenEngine(fails=fails), settings())
        bridge.start()
        assert bridge.ready
        streams = [bridge.submit(request(id)) for id in "abc"]
        for events in await asyncio.wait_for(asyncio.gather(*map(events_of, streams)), 10):
            assert isinstance(events[-1], Failed)
            assert isinstance(events[-1].error, UnavailableError)
            assert len([event for event in events if isinstance(event, TERMINAL)]) == 1
        assert not bridge.ready
        assert bridge.stats == (0, 0)
        with pytest.raises(UnavailableError, match="RuntimeError"):
            bridge.submit(request("late"))
        await bridge.close(1.0)

    asyncio.run(run())


def test_a_function_is_called_by_the_engines_thread_and_never_left_waiting():
    async def body(bridge: Bridge, model: ToyModel) -> None:
        assert await bridge.call(lambda: threading.current_thread().name) == "engine"
        with pytest.raises(KeyError, match="mine"):
            await bridge.call(lambda: {}["mine"])
        gate = Gate(model)
        stream = bridge.submit(request())
        await until(gate.reached.is_set)
        call = asyncio.create_task(bridge.call(lambda: 1))
        await asyncio.sleep(0)
        gate.open()
        assert await call == 1
        assert isinstance((await events_of(stream))[-1], Completed)
        await bridge.close(0.0)
        with pytest.raises(UnavailableError):
            await bridge.call(lambda: 1)

    on_bridge(body)


def test_a_call_that_the_thread_did_not_live_to_make_fails():
    async def run() -> None:
        bridge = Bridge(BrokenEngine(fails=False), settings())
        bridge.start()
        bridge.submit(request("a"))
        calls = [asyncio.create_task(bridge.call(lambda: time.sleep(0.01))) for _ in range(50)]
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        assert all(result is None or isinstance(result, UnavailableError) for result in results)

    asyncio.run(run())


def test_the_thread_works_within_what_it_is_given():
    seen: list[str] = []

    @contextlib.contextmanager
    def around():
        seen.append(threading.current_thread().name)
        yield
        seen.append("left")

    async def run() -> None:
        bridge = Bridge(DiffusionEngine(ToyModel(), settings()), settings(max_waiting=1), thread="llm", around=around)
        bridge.start()
        assert isinstance((await events_of(bridge.submit(request())))[-1], Completed)
        await bridge.close(0.0)

    asyncio.run(run())
    assert seen == ["llm", "left"]


def test_a_request_that_the_engine_refuses_fails_alone():
    async def run() -> None:
        bridge = Bridge(BrokenEngine(fails=False), settings())
        bridge.start()
        (failed,) = await events_of(bridge.submit(request("unwelcome")))
        assert isinstance(failed, Failed)
        assert "private" not in str(failed.error)
        assert bridge.ready
        await bridge.close(0.0)

    asyncio.run(run())


def test_a_reader_whose_loop_is_closed_is_gone():
    model = ToyModel()
    gate = Gate(model)
    limits = settings()
    bridge = Bridge(DiffusionEngine(model, limits), limits)
    bridge.start()
    left: list[RequestStream] = []

    async def submit() -> None:
        left.append(bridge.submit(request(steps=200)))
        await until(gate.reached.is_set)

    asyncio.run(submit())
    gate.open()

    async def wait_and_close() -> None:
        await until(lambda: bridge.stats == (0, 0))
        await bridge.close(0.0)

    asyncio.run(wait_and_close())
    assert model.evaluations < 200


def test_a_bridge_that_never_started_refuses_and_closes():
    async def run() -> None:
        bridge = Bridge(DiffusionEngine(ToyModel(), settings()), settings())
        assert not bridge.ready
        with pytest.raises(UnavailableError, match="not running"):
            bridge.submit(request())
        await bridge.close(1.0)

    asyncio.run(run())
