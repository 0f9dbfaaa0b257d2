"""Prometheus metrics, in a registry of their own. No prompt and no tenant is ever a label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector

from service.bridge import Stats
from service.diffusion.request import CACHE_FAULTS, Image, State
from service.events import Timings
from service.llm.request import Timings as TextTimings

if TYPE_CHECKING:
    from cache.latent.lookup import LatentCache
    from service.diffusion.ranks import Ranks
    from service.llm.assembly import Figures

__all__ = ["CONTENT_TYPE", "Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
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
            "stage_latency_seconds",
            "One batch in a stage: embed, encode, lookup, denoise (a step), preview, decode, llm (a pass)",
            "stage",
        )
        self.batches = self._histogram("step_batch_size", "Pictures that one step advanced", buckets=BATCHES)
        self.steps_run = self._counter("steps_run", "Steps that were run, over all pictures")
        self.steps_skipped = self._counter("steps_skipped", "Steps that needed no running, over all pictures")
        self.lookups = self._counter("cache_lookups", "Finished pictures by what the cache had for them", "result")
        self.cache_faults = self._counter(
            "cache_faults",
            f"What the cache did not do for a request, by kind: {', '.join(CACHE_FAULTS)}",
            "kind",
        )
        for kind in CACHE_FAULTS:  # so that a rate can be taken of the first one too
            self.cache_faults.labels(kind=kind)
        self.ticks = self._counter("ticks", "Steps of batches, by how many GPUs shared each picture", "patch_degree")
        self.evaluations = self._counter("evaluations", "Network evaluations, over all pictures")
        self.llm_requests = self._counter("llm_requests", "Requests for text that ended, by outcome", "outcome")
        self.llm_latency = self._histogram("llm_request_latency_seconds", "From acceptance to the end of a request")
        self.llm_first_token = self._histogram("llm_first_token_seconds", "From acceptance to a request's first token")
        self.llm_batches = self._histogram("llm_batch_tokens", "Tokens that one pass computed", buckets=TOKENS)
        self.rewrites = self._counter("rewrites", "Prompts to be rewritten, by what became of them", "outcome")
        self.rewrite_time = self._histogram("rewrite_seconds", "From a prompt to its rewriting, or to giving it up")
        self.http_requests = self._counter("http_requests", "HTTP replies", "route", "status")

    # The engine's observer; called from its thread.

    def tick(self, pictures: int, evaluations: int, seconds: float) -> None:
        self.batches.observe(pictures)
        self.steps_run.inc(pictures)
        self.evaluations.inc(evaluations)
        self.stages.labels(stage="denoise").observe(seconds)

    def stage(self, name: str, seconds: float) -> None:
        self.stages.labels(stage=name).observe(seconds)

    def split(self, degree: int) -> None:
        self.ticks.labels(patch_degree=degree).inc()

    def cache_fault(self, kind: str) -> None:
        self.cache_faults.labels(kind=kind).inc()

    def batch(self, sequences: int, tokens: int, seconds: float) -> None:
        self.llm_batches.observe(tokens)
        self.stages.labels(stage="llm").observe(seconds)

    # What the service sees; called from the event loop.

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Ask for the running and waiting requests whenever the metrics are read."""
        self.running.set_function(lambda: stats().running)
        self.waiting.set_function(lambda: stats().waiting)

    def watch_jobs(self, counts: Callable[[], Mapping[State, int]]) -> None:
        """Ask for the jobs whenever the metrics are read."""
        self.registry.register(JobsCollector(counts))

    def watch_ranks(self, ranks: Ranks) -> None:
        """Ask the group of GPUs for its figures whenever the metrics are read."""
        self.registry.register(RanksCollector(ranks))

    def watch_cache(self, cache: LatentCache) -> None:
        """Ask the cache for its own figures whenever the metrics are read."""
        self.registry.register(CacheCollector(cache))

    def finished(self, image: Image) -> None:
        """A picture is done."""
        self.lookups.labels(result=image.cache_result).inc()
        self.steps_skipped.inc(image.steps_skipped)

    def ended(self, outcome: str, timings: Timings | None) -> None:
        """A request is completed, failed, cancelled, or was rejected by a full queue; only the last has no timings."""
        self.requests.labels(outcome=outcome).inc()
        if timings is not None:
            self.latency.observe(timings.total_s)
            self.queue_time.observe(timings.queue_s)

    def watch_writer(self, figures: Callable[[], Figures], stats: Callable[[], Stats]) -> None:
        """Ask the language model's engine for its own figures whenever the metrics are read."""
        self.registry.register(WriterCollector(figures, stats))

    def text_ended(self, outcome: str, timings: Timings | None) -> None:
        """As `ended`, of a request for text."""
        self.llm_requests.labels(outcome=outcome).inc()
        if timings is not None:
            self.llm_latency.observe(timings.total_s)
        if isinstance(timings, TextTimings) and timings.first_token_s:
            self.llm_first_token.observe(timings.first_token_s)

    def rewritten(self, outcome: str, seconds: float) -> None:
        """A prompt was rewritten, or was not."""
        self.rewrites.labels(outcome=outcome).inc()
        self.rewrite_time.observe(seconds)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"headstart_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(f"headstart_{name}", help, labels, registry=self.registry, buckets=buckets)


class JobsCollector(Collector):
    """Jobs that can be asked for."""

    def __init__(self, counts: Callable[[], Mapping[State, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily("headstart_jobs", "Jobs that can be asked for, by state", labels=["state"])
        for state, count in self._counts().items():
            jobs.add_metric([state], count)
        yield jobs


class RanksCollector(Collector):
    """Several GPUs as one group."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("headstart_gpus", "GPUs that draw together", self._ranks.gpus)
        yield CounterMetricFamily("headstart_rank_restarts", "Times that they were started anew", self._ranks.restarts)
        yield GaugeMetricFamily(
            "headstart_rank_conditions",
            "Conditions that a GPU other than the first held at its last call, at most",
            self._ranks.held,
        )


class CacheCollector(Collector):
    """The latent cache's figures, all tenants together."""

    def __init__(self, cache: LatentCache) -> None:
        self._cache = cache

    def collect(self) -> Iterable[Metric]:
        totals = self._cache.totals()
        yield GaugeMetricFamily("headstart_cache_entries", "Prompts with cached latents", totals.entries)
        yield GaugeMetricFamily("headstart_cache_bytes", "What they take in the store", totals.bytes)
        hits = CounterMetricFamily(
            "headstart_cache_hits",
            "Starts found, by the steps of 50 that their latents have behind them",
            labels=["steps"],
        )
        for steps, count in totals.hits_by_steps.items():
            hits.add_metric([str(steps)], count)
        yield hits
        changes = CounterMetricFamily(
            "headstart_cache_changes",
            "Entries stored and dropped before they were; levels evicted for room, expired and lost by the store",
            labels=["change"],
        )
        for change in ("stored", "dropped", "evicted", "expired", "lost"):
            changes.add_metric([change], totals.counts.get(change, 0))
        yield changes
        yield CounterMetricFamily("headstart_cache_errors", "Failures of the store", self._cache.errors)
        yield CounterMetricFamily("headstart_cache_damaged", "Damaged records found and removed", self._cache.damaged)


class WriterCollector(Collector):
    """The language model's engine: tokens, requests, and pages of keys and values."""

    def __init__(self, figures: Callable[[], Figures], stats: Callable[[], Stats]) -> None:
        self._figures, self._stats = figures, stats

    def collect(self) -> Iterable[Metric]:
        figures, stats = self._figures(), self._stats()
        tokens = CounterMetricFamily(
            "headstart_llm_tokens", "Read in prompts, of these found in memory, and generated", labels=["kind"]
        )
        for kind, count in (
            ("prompt", figures.prompt),
            ("cached", figures.cached),
            ("generated", figures.generated),
        ):
            tokens.add_metric([kind], count)
        yield tokens
        yield CounterMetricFamily(
            "headstart_llm_preemptions", "Times that an answer gave its pages up for others", figures.preemptions
        )
        yield GaugeMetricFamily("headstart_llm_requests_running", "Requests being answered", stats.running)
        yield GaugeMetricFamily("headstart_llm_requests_waiting", "Requests accepted, not started", stats.waiting)
        yield GaugeMetricFamily("headstart_kv_pages", "Pages of keys and values", figures.pages)
        yield GaugeMetricFamily("headstart_kv_pages_used", "Of these, in use by live requests", figures.pages_used)
        yield GaugeMetricFamily("headstart_kv_pages_kept", "Of these, prefixes of past requests", figures.pages_kept)
