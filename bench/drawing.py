"""Draw requests through an engine, so many at once; what the benchmarks beside this file share."""

from __future__ import annotations

from collections.abc import Sequence

from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import Completed, Image, ImageRequest
from service.events import Failed


def draw(engine: DiffusionEngine, requests: Sequence[ImageRequest], at_once: int) -> list[Image]:
    """The pictures of all requests in the order of the requests; a new request enters for each that completes.

    Stops the program if one fails.
    """
    images: dict[tuple[str, int], Image] = {}
    waiting = list(requests)
    live = 0
    while waiting or live:
        while waiting and live < at_once:
            engine.add(waiting.pop(0))
            live += 1
        for event in engine.step():
            if isinstance(event, Failed):
                raise SystemExit(f"request {event.request_id} failed: {event.error}")
            if isinstance(event, Image):
                images[event.request_id, event.index] = event
            live -= isinstance(event, Completed)
    return [images[request.id, index] for request in requests for index in range(request.n)]
