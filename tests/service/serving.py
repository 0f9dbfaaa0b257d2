"""A server on a real port around an engine that draws nothing: each picture is one colour, its seed."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np

from models.diffusion.model import ModelCard, SamplerDefaults
from service.api.server import Server, listen
from service.api.state import Service
from service.app import Opener, create_app
from service.bridge import Bridge
from service.config import EngineSettings, ServerSettings, Settings
from service.diffusion.request import Completed, Event, Image, ImageRequest, Partial, Progress, Timings
from service.errors import HeadstartError, NonFiniteError
from service.events import Cancelled, Failed, Started
from service.metrics import Metrics
from service.runtime import Runtime

CARD = ModelCard(
    name="fake",
    kind="sd",
    source="nowhere",
    revision="1",
    default_size=(64, 64),
    size_multiple=8,
    latent_channels=4,
    scale=8,
    max_prompt_tokens=77,
    num_classes=None,
    default_sampler="ddim",
    samplers={"ddim": SamplerDefaults(4, 2.0, "leading"), "lcm": SamplerDefaults(2, 1.0, "trailing")},
    loras=("ink",),
)


def picture(request: ImageRequest, seed: int) -> np.ndarray:
    colour = [seed >> shift & 255 for shift in (16, 8, 0)]
    return np.broadcast_to(np.array(colour, np.uint8), (request.height, request.width, 3)).copy()


class FakeEngine:
    """Runs one row of every request in a step of `step_s` seconds.

    The prompt steers it: "overflow" fails after the first step, "crash" ends the thread.
    """

    def __init__(self, step_s: float = 0.001) -> None:
        self.step_s = step_s
        self.requests: dict[str, ImageRequest] = {}
        self.rows: dict[str, int] = {}
        self.ended: list[Event] = []
        self.events: list[Event] = []

    def add(self, request: ImageRequest) -> None:
        self.requests[request.id] = request
        self.rows[request.id] = 0

    def abort(self, request_id: str) -> None:
        if request_id in self.requests:
            self.events.append(self._end(Cancelled(request_id, Timings())))

    def has_work(self) -> bool:
        return bool(self.requests or self.events)

    def step(self) -> list[Event]:
        if self.requests:
            time.sleep(self.step_s)
        for request in list(self.requests.values()):
            self._advance(request)
        events, self.events = self.events, []
        return events

    def fail_all(self, error: HeadstartError) -> list[Event]:
        return [self._end(Failed(request_id, error, Timings())) for request_id in list(self.requests)]

    def _advance(self, request: ImageRequest) -> None:
        if request.prompt == "crash":
            raise RuntimeError("the prompt said so")
        if self.rows[request.id] == 0:
            self.events.append(Started(request.id))
        self.rows[request.id] += 1
        row = self.rows[request.id]
        if request.prompt == "overflow":
            error = NonFiniteError("the latents overflowed at step 1")
            self.events.append(self._end(Failed(request.id, error, Timings())))
            return
        for index in range(request.n):
            self.events.append(Progress(request.id, index, row, request.steps))
            if row <= request.partial_images:
                self.events.append(Partial(request.id, index, row - 1, picture(request, 0)))
            if row == request.steps:
                seed = (request.seed + index) % 2**32
                self.events.append(Image(request.id, index, seed, picture(request, seed), row, 1, 2 * row))
        if row == request.steps:
            self.events.append(
                self._end(
                    Completed(request.id, Timings(queue_s=0.1, encode_s=0.2, denoise_s=0.3, decode_s=0.4, total_s=1.0))
                )
            )

    def _end(self, event: Event) -> Event:
        del self.requests[event.request_id], self.rows[event.request_id]
        self.ended.append(event)
        return event


@dataclasses.dataclass
class Running:
    """A server that listens. `url` has no slash at its end."""

    url: str
    port: int
    engine: FakeEngine
    service: Service
    server: Server


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def settings(**changes: object) -> Settings:
    server = {name: changes.pop(name) for name in list(changes) if name in ServerSettings.__slots__}
    return Settings(server=ServerSettings(**server), engine=EngineSettings(**changes))  # type: ignore[arg-type]


@contextlib.contextmanager
def serving(step_s: float = 0.001, loading: threading.Event | None = None, **changes: object) -> Iterator[Running]:
    """Serve the fake engine in a thread; ready when it yields or, if `loading` is given, once that is set."""
    engine = FakeEngine(step_s)

    def opener(given: Settings, metrics: Metrics) -> Runtime:
        if loading is not None:
            loading.wait()
        bridge = Bridge(engine, given.engine)
        bridge.start()
        return Runtime(CARD, bridge, given.engine)

    with listening(settings(**changes), opener, ready=loading is None) as (url, server):
        yield Running(url, int(url.rpartition(":")[2]), engine, server.service, server)


@contextlib.contextmanager
def listening(chosen: Settings, opener: Opener, ready: bool = True) -> Iterator[tuple[str, Server]]:
    """Serve on a free port in a thread, and wait until requests are taken if `ready`."""

    def on_failure(error: Exception) -> None:
        raise error

    app = create_app(chosen, opener, lambda model: None, on_failure)
    server = Server(app, app.state.service)
    listener = listen(dataclasses.replace(chosen.server, port=0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    url = f"http://127.0.0.1:{port}"
    try:
        while ready and httpx.get(f"{url}/health/ready").status_code != 200:
            time.sleep(0.005)
        yield url, server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
