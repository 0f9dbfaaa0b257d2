"""Prometheus metrics, in a registry of their own. No prompt is ever a label."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from service.bridge import Stats
from service.diffusion.request import Timings

__all__ = ["CONTENT_TYPE", "Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)


class Metrics:
    """What one server counts; the engine's observer."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.running = Gauge("headstart_requests_running", "Requests being drawn", registry=self.registry)
        self.waiting = Gauge("headstart_requests_waiting", "Requests accepted and not started", registry=self.registry)
        self.requests = self._counter("requests", "Requests that ended, by outcome", "outcome")
        self.latency = self._histogram("e2e_request_latency_seconds", "From acceptance to the end of a request")
        self.queue_time = self._histogram("queue_time_seconds", "From acceptance to the first step of a request")
        self.stages = self._histogram(
            "stage_latency_seconds", "One batch in a stage: encode, denoise (a step), preview, decode", "stage"
        )
        self.batches = self._histogram("step_batch_size", "Pictures that one step advanced", buckets=BATCHES)
        self.steps_run = self._counter("steps_run", "Steps that were run, over all pictures")
        self.steps_skipped = self._counter("steps_skipped", "Steps that needed no running, over all pictures")
        self.evaluations = self._counter("evaluations", "Network evaluations, over all pictures")
        self.http_requests = self._counter("http_requests", "HTTP replies", "route", "status")

    # The engine's observer; called from its thread.

    def tick(self, pictures: int, evaluations: int, seconds: float) -> None:
        self.batches.observe(pictures)
        self.steps_run.inc(pictures)
        self.evaluations.inc(evaluations)
        self.stages.labels(stage="denoise").observe(seconds)

    def stage(self, name: str, seconds: float) -> None:
        self.stages.labels(stage=name).observe(seconds)

    # What the service sees; called from the event loop.

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Ask for the running and waiting requests whenever the metrics are read."""
        self.running.set_function(lambda: stats().running)
        self.waiting.set_function(lambda: stats().waiting)

    def ended(self, outcome: str, timings: Timings | None) -> None:
        """A request is completed, failed, cancelled, or was rejected by a full queue; only the last has no timings."""
        self.requests.labels(outcome=outcome).inc()
        if timings is not None:
            self.latency.observe(timings.total_s)
            self.queue_time.observe(timings.queue_s)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"headstart_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(f"headstart_{name}", help, labels, registry=self.registry, buckets=buckets)
