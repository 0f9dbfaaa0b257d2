"""Step-level continuous batching of pictures: requests join and leave at every tick (Orca, Yu et al. 2022, for images).

Decoding happens between ticks, at most DECODE_BATCH pictures of one shape at a time, as soon as they are denoised: no
picture is held back for company, and running ones wait for a bounded piece of work between two of their rows.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

from accel.memory.latents import LatentSlots
from accel.samplers.library import build_plan
from accel.samplers.plans import Plan
from accel.samplers.schedules import ConsistencySchedule
from models.diffusion.model import Condition, DiffusionModel, ModelCard
from service.config import EngineSettings
from service.diffusion.picture import Job, Picture, Tick
from service.diffusion.ranks import Places, Ranks
from service.diffusion.request import Completed, Event, Image, ImageRequest, Partial, Progress, State
from service.diffusion.runner import Runner
from service.diffusion.scheduler import Scheduler
from service.diffusion.starts import GuardedStarts, Starts, Wanted
from service.errors import DeadlineError, HeadstartError, InputError, UnavailableError
from service.events import Cancelled, Failed, Started
from service.faults import explained

log = logging.getLogger(__name__)

DECODE_BATCH = 4


class Observer(Protocol):
    """What the engine reports as it goes; called from its thread."""

    def tick(self, pictures: int, evaluations: int, seconds: float) -> None:
        """One tick advanced so many pictures with so many network rows; on a GPU, seconds until it was handed over."""
        ...

    def stage(self, name: str, seconds: float) -> None:
        """One batch went through "encode", "lookup", "preview" or "decode"."""
        ...

    def split(self, degree: int) -> None:
        """One tick ran, each of its pictures shared by so many GPUs."""
        ...

    def cache_fault(self, kind: str) -> None:
        """The cache did not do its part (see `CACHE_FAULTS`). From any thread."""
        ...


class NullObserver:
    def tick(self, pictures: int, evaluations: int, seconds: float) -> None: ...
    def stage(self, name: str, seconds: float) -> None: ...
    def split(self, degree: int) -> None: ...
    def cache_fault(self, kind: str) -> None: ...


class DiffusionEngine:
    """Draws pictures. Not thread-safe: one thread calls every method.

    Every added request gets Started at most once, then its Progress, Partial and Image events, and exactly one of
    Completed, Failed, Cancelled.

    Args:
        starts: where pictures may start from latents of others, and leave their own; None: all start from noise.
        ranks: the group of GPUs that the model runs on; None: this process alone.
    """

    def __init__(
        self,
        model: DiffusionModel,
        settings: EngineSettings,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        starts: Starts | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._watched = contextlib.nullcontext if ranks is None else ranks.watched
        self._stranded = False  # the ranks could not be started anew; the next request is reason to try again
        latents = LatentSlots(settings.max_running, model.device)
        slots = latents if ranks is None else Places(latents, ranks)
        self._scheduler = Scheduler(settings.max_batch, settings.ageing_s, slots)
        self._runner = Runner(model, latents, settings.max_batch, ranks)
        self.observer: Observer = observer or NullObserver()
        self._clock = clock
        self._events: list[Event] = []
        self._plan = lru_cache(maxsize=1024)(self._build_plan)
        self._starts = None if starts is None else GuardedStarts(starts, self._observe_fault)

    @property
    def card(self) -> ModelCard:
        return self._model.card

    def add(self, request: ImageRequest) -> None:
        """Queue a request.

        Raises:
            InputError: the sampler has no plan of so many steps.
        """
        try:
            plan = self._plan(request.sampler, request.loras, request.steps, request.eta, request.timesteps, 0)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._scheduler.add(request, plan, self._runner.bucket(request), self._clock())
        self._stranded = False

    def abort(self, request_id: str) -> None:
        """Cancel a request before its next row; its Cancelled comes with the next step. An unknown id is no error."""
        job = self._scheduler.jobs.get(request_id)
        if job is not None:
            self._scheduler.end(job, State.CANCELLED)
            self._events.append(Cancelled(request_id, job.timings(self._clock())))

    def has_work(self) -> bool:
        lost = self._ranks is not None and self._ranks.lost is not None and not self._stranded
        return bool(self._scheduler.jobs or self._events or lost)

    def settle(self, timeout_s: float) -> None:
        """Wait, at most so long, until the latents of completed requests are with the cache. From any thread."""
        if self._starts is not None:
            self._starts.settle(timeout_s)

    def fail_all(self, error: HeadstartError) -> list[Event]:
        """End every live request with this error."""
        for job in list(self._scheduler.jobs.values()):
            self._fail(job, error)
        return self._drain()

    def step(self) -> list[Event]:
        """Admit, run one row of one batch, copy latents to keep, decode what it finished; what happened, in order."""
        if self._ranks is not None and self._ranks.lost is not None:
            return self._mend(self._ranks, self._ranks.lost)
        with self._watched():
            self._expire()
            self._admit()
            tick = self._scheduler.schedule(self._clock())
            if tick is not None:
                self._run(tick)
                self._copy(tick)
                self._preview(tick)
            self._decode()
        return self._drain()

    def _mend(self, ranks: Ranks, lost: HeadstartError) -> list[Event]:
        """Fail the requests that have begun; when they have been told, start the ranks anew for those that wait."""
        begun = [job for job in self._scheduler.jobs.values() if job.started is not None]
        for job in begun:
            self._fail(job, lost)
        if not begun and not self._events:
            try:
                ranks.restart()
            except HeadstartError as error:
                log.error("%s", error.message)
                self._stranded = True
                return self.fail_all(UnavailableError(error.message, code="rank_lost"))
        return self._drain()

    def _observe_fault(self, kind: str) -> None:
        self.observer.cache_fault(kind)

    def _expire(self) -> None:
        for job in self._scheduler.expired(self._clock()):
            message = f"deadline_s: not done within {job.request.deadline_s:g} s"
            self._fail(job, DeadlineError(message, param="deadline_s"))

    def _admit(self) -> None:
        """Give out free slots; for requests that get their first, encode the prompts, alike ones together, and look for
        latents to start from."""
        admitted, refused = self._scheduler.admit(self._clock())
        if refused is not None:
            self._fail_picture(refused[0], explained(refused[1], "starting a picture"))
        groups: dict[tuple[object, ...], list[Job]] = {}
        for job in self._jobs_of(admitted):
            if job.condition is None:
                request = job.request
                self._events.append(Started(request.id))
                alike = (request.tenant, request.sampler, request.width, request.height, request.loras)
                groups.setdefault(alike, []).append(job)
        for jobs in groups.values():
            self._encode(jobs)
        self._enter([job for jobs in groups.values() for job in jobs if job.condition is not None])
        self._begin([picture for picture in admitted if picture.state is State.IN_PROGRESS])

    def _begin(self, pictures: list[Picture]) -> None:
        try:
            self._runner.begin(pictures)
        except Exception as error:
            reason = explained(error, "starting a picture")
            for picture in pictures:
                self._fail_picture(picture, reason)

    def _encode(self, jobs: list[Job]) -> None:
        begun = self._clock()
        conditions: Sequence[Condition] = []
        try:
            conditions = self._runner.encode([job.request for job in jobs])
        except HeadstartError as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:  # one at a time, so that only those at fault fail
                for job in jobs:
                    self._encode([job])
            return
        seconds = self._clock() - begun
        self.observer.stage("encode", seconds)
        for job, condition in zip(jobs, conditions, strict=True):
            job.encode_s += seconds
            self._scheduler.attach(job, condition)

    def _enter(self, jobs: list[Job]) -> None:
        """Let pictures of new requests enter their plans late, from latents that are found; mark what is to be kept."""
        if self._starts is None:
            return
        looking = [job for job in jobs if job.request.cache is not None and job.request.cache.look]
        if looking:
            self._look(looking, self._starts)
        for job in jobs:
            picture = job.pictures[0]
            if job.request.cache is not None and job.request.cache.store and picture.start is None:
                self._scheduler.mark(picture, self._starts.marks(job.request, picture.plan))

    def _look(self, jobs: list[Job], starts: GuardedStarts) -> None:
        begun = self._clock()
        wanted = [Wanted(job.request, job.pictures[0].plan, job.pictures[0].bucket.shape) for job in jobs]
        found = starts.find(wanted)
        seconds = self._clock() - begun
        self.observer.stage("lookup", seconds)
        for job, (request, plan, _), of_job in zip(jobs, wanted, found, strict=True):
            job.looked = True
            job.lookup_s += seconds
            for picture, start in zip(job.pictures, of_job, strict=True):
                if start is not None:
                    first = start.entry(plan.rows)
                    late = self._plan(
                        request.sampler, request.loras, request.steps, request.eta, request.timesteps, first
                    )
                    self._scheduler.enter(picture, late, start)

    def _run(self, tick: Tick) -> None:
        begun = self._clock()
        advanced, failed = self._runner.run(tick)
        self._scheduler.commit(advanced)
        for picture, error in failed:
            self._fail_picture(picture, error)
        if any(picture.denoised for picture in advanced):
            self._runner.wait()  # so that the time is the denoising's, not the decoding's
        seconds = self._clock() - begun
        self.observer.tick(len(advanced), sum(picture.evaluations for picture in advanced), seconds)
        self.observer.split(tick.bucket.degree)
        for job in self._jobs_of(advanced):
            job.denoise_s += seconds
        for picture in advanced:
            if picture.state is State.IN_PROGRESS:
                first, total = picture.plan.first, picture.plan.first + len(picture.plan)
                self._events.append(Progress(picture.request.id, picture.index, first + picture.cursor, total))

    def _copy(self, tick: Tick) -> None:
        """Send the latents that are to be kept on their way to the host."""
        marked = [picture for picture in tick.pictures if picture.marked]
        if marked:
            for picture, latent in zip(marked, self._runner.copy(marked), strict=False):
                self._scheduler.jobs[picture.request.id].latents[picture.row.alpha] = latent

    def _preview(self, tick: Tick) -> None:
        due = [picture for picture in tick.pictures if _preview_number(picture) is not None]
        if not due:
            return
        begun = self._clock()
        results = self._runner.preview(due)
        self.observer.stage("preview", self._clock() - begun)
        for picture, result in zip(due, results, strict=True):
            number = _preview_number(picture)
            if isinstance(result, HeadstartError):
                self._fail_picture(picture, result)
            elif number is not None:  # else its request has just failed over another picture
                self._events.append(Partial(picture.request.id, picture.index, number, result))

    def _decode(self) -> None:
        pictures = self._scheduler.to_decode(DECODE_BATCH)
        if not pictures:
            return
        begun = self._clock()
        results = self._runner.decode(pictures)
        seconds = self._clock() - begun
        self.observer.stage("decode", seconds)
        for job in self._jobs_of(pictures):
            job.decode_s += seconds
        for picture, result in zip(pictures, results, strict=True):
            if isinstance(result, HeadstartError):
                self._fail_picture(picture, result)
            elif picture.state is State.IN_PROGRESS:
                self._finish(picture, result)

    def _finish(self, picture: Picture, pixels: object) -> None:
        job = self._scheduler.jobs[picture.request.id]
        self._events.append(_image(picture, pixels, job.looked))
        if self._scheduler.complete(picture):
            self._events.append(Completed(job.request.id, job.timings(self._clock()), self._warnings(job)))
            if self._starts is not None and job.latents:
                # The decoder has waited for the device, and with it for these copies.
                self._starts.keep(job.request, {alpha: latent() for alpha, latent in job.latents.items()})

    def _warnings(self, job: Job) -> tuple[str, ...]:
        condition = job.condition
        assert condition is not None
        texts = {"prompt": condition.positive, "negative_prompt": condition.negative}
        most = self.card.max_prompt_tokens
        warnings = [
            f"{field}: its last {text.unread} tokens were ignored; this model reads {most} tokens"
            for field, text in texts.items()
            if text is not None and text.unread
        ]
        request = job.request
        if request.negative_prompt and texts["negative_prompt"] is None:
            setting = f"the sampler {request.sampler} at guidance_scale {request.guidance_scale:g}"
            warnings.append(f"negative_prompt: it has no effect on {setting}")
        return tuple(warnings)

    def _fail_picture(self, picture: Picture, error: HeadstartError) -> None:
        job = self._scheduler.jobs.get(picture.request.id)
        if job is not None:  # else another picture has ended the request already
            self._fail(job, error)

    def _fail(self, job: Job, error: HeadstartError) -> None:
        self._scheduler.end(job, State.FAILED)
        self._events.append(Failed(job.request.id, error, job.timings(self._clock())))

    def _jobs_of(self, pictures: Sequence[Picture]) -> list[Job]:
        """The live requests of these pictures, each once, in order."""
        jobs = self._scheduler.jobs
        ids = dict.fromkeys(picture.request.id for picture in pictures)
        return [jobs[request_id] for request_id in ids if request_id in jobs]

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _build_plan(
        self,
        sampler: str,
        loras: tuple[tuple[str, float], ...],
        steps: int,
        eta: float,
        timesteps: tuple[int, ...],
        first: int,
    ) -> Plan:
        defaults = self._model.card.defaults(sampler, loras)
        schedule = self._model.schedule(sampler, loras)
        if timesteps:
            assert isinstance(schedule, ConsistencySchedule)  # admission has no other take them
            schedule = replace(schedule, explicit_timesteps=timesteps)
        spacing, karras = defaults.spacing, defaults.karras
        return build_plan(sampler, schedule, steps, spacing=spacing, karras=karras, eta=eta, first=first)


def _image(picture: Picture, pixels: object, looked: bool) -> Image:
    steps, start = len(picture.plan), picture.start
    return Image(
        picture.request.id,
        picture.index,
        picture.seed,
        pixels,
        steps_run=steps,
        steps_skipped=picture.plan.first,
        evaluations=steps * picture.evaluations,
        cache_result="bypass" if not looked else "miss" if start is None else "hit",
        similarity=None if start is None else start.similarity,
    )


def _preview_number(picture: Picture) -> int | None:
    """Which preview is due now, if any.

    k previews stand after rows round(rows * i / (k + 1)), i from 1 to k; a plan of fewer rows gives fewer previews.
    """
    if picture.state is not State.IN_PROGRESS or picture.denoised:
        return None
    parts = picture.request.partial_images + 1
    marks = dict.fromkeys(round(len(picture.plan) * i / parts) for i in range(1, parts))
    marks.pop(0, None)
    return list(marks).index(picture.cursor) if picture.cursor in marks else None
