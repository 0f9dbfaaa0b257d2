"""Pictures that start from latents of others, and leave their own."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from accel.samplers.library import build_plan
from accel.samplers.plans import Plan
from service.diffusion import starts as module
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import CacheIntent, Completed, Event, Image, ImageRequest, Partial, Progress
from service.diffusion.starts import Start, Starts
from service.events import Cancelled, Failed
from tests.service.diffusion.toy import CARD, CHANNELS, ToyModel, drain, request, settings

SHAPE = (CHANNELS, 4, 4)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no fault."""
    monkeypatch.setattr(module, "PATIENCE_S", 30.0)


class Shelf:
    """A Starts that gives every request what it is told to, and notes what it is given."""

    def __init__(self, found: Mapping[str, Sequence[Start | None]] | None = None, rows: Sequence[int] = ()) -> None:
        self.found = dict(found or {})
        self.rows = rows
        self.kept: dict[str, Mapping[float, np.ndarray]] = {}
        self.asked: list[str] = []

    def find(self, request: ImageRequest, plan: Plan) -> Sequence[Start | None]:
        self.asked.append(request.id)
        return self.found.get(request.id, [None] * request.n)

    def marks(self, request: ImageRequest, plan: Plan) -> Sequence[int]:
        return self.rows

    def keep(self, request: ImageRequest, latents: Mapping[float, np.ndarray]) -> None:
        self.kept[request.id] = latents


def intent(look: bool = True, store: bool = True) -> CacheIntent:
    return CacheIntent(embedding=None, look=look, store=store)


def cached(id: str = "a", look: bool = True, store: bool = True, **changes: object) -> ImageRequest:
    return request(id, cache=intent(look, store), **changes)


def draw(starts: Starts | None, *requests: ImageRequest) -> list[Event]:
    engine = DiffusionEngine(ToyModel(), settings(), starts=starts)
    for each in requests:
        engine.add(each)
    events = drain(engine)
    if engine._starts is not None:
        engine._starts._pool.shutdown()
    return events


def images(events: list[Event]) -> dict[tuple[str, int], Image]:
    return {(event.request_id, event.index): event for event in events if isinstance(event, Image)}


def plan_of(sampler: str, steps: int) -> Plan:
    defaults = CARD.samplers[sampler]
    return build_plan(sampler, ToyModel().schedule(sampler), steps, spacing=defaults.spacing, karras=defaults.karras)


def a_start(alpha: float, seed: int = 0, similarity: float = 0.9) -> Start:
    latent = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float16)
    latent.flags.writeable = False  # as a store's own memory is
    return Start(latent, alpha, similarity)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m_sde", "lcm"])
def test_a_request_started_from_its_own_latents_is_the_same_picture(sampler: str) -> None:
    """Exact but for float16, and for the first-order row of samplers that look back; noise is keyed by the full row."""
    shelf = Shelf(rows=range(1, 12))
    scratch = images(draw(shelf, cached(steps=12, sampler=sampler)))["a", 0]
    assert (scratch.cache_result, scratch.similarity, scratch.steps_skipped) == ("miss", None, 0)
    kept = list(shelf.kept["a"].items())
    assert [alpha for alpha, _ in kept] == [row.alpha for row in plan_of(sampler, 12).rows[1:]]
    for k in (1, 5, 11):
        alpha, latent = kept[k - 1]
        assert (latent.dtype, latent.shape) == (np.float16, SHAPE)
        entered = images(draw(Shelf({"a": [Start(latent, alpha, 1.0)]}), cached(steps=12, sampler=sampler)))["a", 0]
        assert (entered.cache_result, entered.similarity) == ("hit", 1.0)
        assert (entered.steps_run, entered.steps_skipped, entered.evaluations) == (12 - k, k, 12 - k)
        if sampler != "dpmpp_2m_sde":
            error = np.square(np.subtract(entered.pixels, scratch.pixels, dtype=float)).mean()
            assert error <= 255**2 / 10**4  # PSNR of 40 dB


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "lcm"])
def test_latents_of_ddim_enter_other_samplers(sampler: str) -> None:
    shelf = Shelf(rows=(25,))
    draw(shelf, cached(steps=50))
    (alpha, latent), *_ = shelf.kept["a"].items()
    events = draw(Shelf({"b": [Start(latent, alpha, 0.8)]}), cached("b", sampler=sampler, steps=8, guidance_scale=3.0))
    image = images(events)["b", 0]
    assert (image.cache_result, image.similarity) == ("hit", 0.8)
    assert image.steps_skipped + image.steps_run == 8
    assert image.steps_skipped > 0
    rows = plan_of(sampler, 8).rows
    assert rows[image.steps_skipped].alpha <= alpha < rows[image.steps_skipped + 1].alpha


def test_a_latent_between_two_rows_is_renoised_under_the_pictures_own_seed() -> None:
    rows = plan_of("ddim", 10).rows
    alpha = rows[6].alpha - 0.01
    start = Start(np.zeros((CHANNELS, 4, 4), np.float16), alpha, 0.9)
    model = ToyModel()
    engine = DiffusionEngine(model, settings(), starts=Shelf({"a": [start] * 8, "b": [start] * 8}))
    engine.add(cached("a", steps=10, n=8, seed=1))
    engine.add(cached("b", steps=10, n=8, seed=5))
    engine._admit()
    x, _, _ = engine._runner._latents.tensors(SHAPE)
    by_seed: dict[int, list[np.ndarray]] = {}
    for job in engine._scheduler.jobs.values():
        for picture in job.pictures:
            assert picture.plan.first == 5
            by_seed.setdefault(picture.seed, []).append(x[picture.slot].numpy())
    fresh = 1 - (rows[5].alpha / alpha) ** 2
    values = np.concatenate([latents[0] for latents in by_seed.values()])
    assert values.std() == pytest.approx(fresh**0.5, rel=0.12)
    assert len({latents[0].tobytes() for latents in by_seed.values()}) == 12
    assert all(np.array_equal(latents[0], other) for latents in by_seed.values() for other in latents)


def test_events_count_from_the_row_that_was_entered() -> None:
    start = a_start(plan_of("ddim", 10).rows[6].alpha)
    events = draw(Shelf({"a": [start, None]}), cached(steps=10, n=2, guidance_scale=3.0, partial_images=1))
    steps = {i: [e.step for e in events if isinstance(e, Progress) and e.index == i] for i in range(2)}
    assert steps == {0: [7, 8, 9, 10], 1: list(range(1, 11))}
    assert {e.steps for e in events if isinstance(e, Progress)} == {10}
    before = {
        e.index: [f.step for f in events[:i] if isinstance(f, Progress) and f.index == e.index][-1]
        for i, e in enumerate(events)
        if isinstance(e, Partial)
    }
    assert before == {0: 8, 1: 5}  # halfway through what each had to run
    hit, miss = images(events)["a", 0], images(events)["a", 1]
    assert (hit.steps_run, hit.steps_skipped, hit.evaluations, hit.cache_result) == (4, 6, 8, "hit")
    assert (miss.steps_run, miss.steps_skipped, miss.evaluations, miss.cache_result) == (10, 0, 20, "miss")
    (done,) = [event for event in events if isinstance(event, Completed)]
    assert 0 < done.timings.lookup_s < done.timings.total_s


def test_pictures_do_not_depend_on_their_company() -> None:
    rng = random.Random(3)
    samplers = ["ddim", "euler", "euler_a", "dpmpp_2m", "lcm"]
    requests = [
        cached(
            f"r{i}",
            sampler=rng.choice(samplers),
            steps=rng.randint(4, 10),
            guidance_scale=rng.choice([1.0, 5.0]),
            n=rng.choice([1, 2]),
            seed=rng.randrange(2**32),
        )
        for i in range(16)
    ]
    found = {
        each.id: [a_start(rng.uniform(0.2, 0.9), seed=i) if rng.random() < 0.7 else None for _ in range(each.n)]
        for i, each in enumerate(requests)
    }
    shelf = Shelf(found, rows=(1, 2, 3))
    together = images(draw(shelf, *requests))
    assert {image.cache_result for image in together.values()} == {"hit", "miss"}
    for each in requests:
        own = Shelf(found, rows=(1, 2, 3))
        for key, image in images(draw(own, each)).items():
            np.testing.assert_array_equal(image.pixels, together[key].pixels)
        assert own.kept.keys() == ({each.id} if each.id in shelf.kept else set())
        for alpha, latent in own.kept.get(each.id, {}).items():
            np.testing.assert_array_equal(latent, shelf.kept[each.id][alpha])


@pytest.mark.parametrize(
    ("look", "store", "asked", "kept", "result"),
    [
        (True, True, ["a"], {"a"}, "miss"),
        (True, False, ["a"], set(), "miss"),
        (False, True, [], {"a"}, "bypass"),
        (False, False, [], set(), "bypass"),
    ],
)
def test_only_what_the_intent_allows_is_done(look: bool, store: bool, asked, kept, result: str) -> None:
    shelf = Shelf(rows=(2,))
    events = draw(shelf, cached(look=look, store=store, n=2))
    assert (shelf.asked, shelf.kept.keys()) == (asked, kept)
    assert {image.cache_result for image in images(events).values()} == {result}


def test_without_intent_or_without_a_cache_all_is_as_ever() -> None:
    plain = images(draw(None, request("a")))["a", 0]
    for starts, asked in ((Shelf({"a": [a_start(0.5)]}, rows=(1,)), request("a")), (None, cached("a"))):
        image = images(draw(starts, asked))["a", 0]
        assert image.cache_result == "bypass"
        np.testing.assert_array_equal(image.pixels, plain.pixels)
        assert starts is None or not (starts.asked or starts.kept)


def test_a_first_picture_that_hit_leaves_nothing() -> None:
    shelf = Shelf({"a": [a_start(0.5), None], "b": [None, a_start(0.5)]}, rows=(1, 2))
    draw(shelf, cached("a", n=2), cached("b", n=2))
    assert shelf.kept.keys() == {"b"}


def test_rows_that_are_no_inner_rows_are_not_kept() -> None:
    shelf = Shelf(rows=(-1, 0, 3, 5, 99))
    draw(shelf, cached(steps=5))
    assert list(shelf.kept["a"]) == [plan_of("ddim", 5).rows[3].alpha]


def test_cancelled_and_failed_requests_leave_nothing() -> None:
    shelf = Shelf(rows=(1, 2, 3, 4))
    engine = DiffusionEngine(ToyModel(), settings(), starts=shelf)
    for each in (cached("gone"), cached("poison", prompt="poison"), cached("late", deadline_s=30.0), cached("good")):
        engine.add(each)
    for _ in range(3):
        engine.step()
    engine.abort("gone")
    engine._clock = lambda: 1e12
    events = drain(engine)
    assert engine._starts is not None
    engine._starts._pool.shutdown()
    assert {event.request_id for event in events if isinstance(event, Cancelled)} == {"gone"}
    assert {event.request_id for event in events if isinstance(event, Failed)} == {"poison", "late"}
    assert shelf.kept.keys() == {"good"}


def test_a_latent_that_does_not_fit_float16_is_not_kept() -> None:
    shelf = Shelf()
    guarded = module.GuardedStarts(shelf)
    guarded.keep(request("a"), {0.5: np.full(SHAPE, np.inf, np.float16), 0.6: np.zeros(SHAPE, np.float16)})
    guarded.keep(request("b"), {0.5: np.full(SHAPE, np.nan, np.float16)})
    guarded._pool.shutdown()
    assert {id: list(latents) for id, latents in shelf.kept.items()} == {"a": [0.6]}


@pytest.mark.parametrize(
    "start",
    [
        a_start(0.5)._replace(latent=np.zeros((CHANNELS, 4, 5), np.float16)),
        a_start(0.5)._replace(latent=np.full(SHAPE, np.nan, np.float16)),
        a_start(0.0),
        a_start(-0.5),
        a_start(1.5),
        a_start(float("nan")),
        a_start(plan_of("ddim", 5).rows[1].alpha - 0.01),
    ],
)
def test_a_start_that_cannot_be_used_is_a_miss(start: Start) -> None:
    shelf = Shelf({"a": [start]}, rows=(2,))
    engine = DiffusionEngine(ToyModel(), settings(), starts=shelf)
    engine.add(cached())
    image = images(drain(engine))["a", 0]
    assert (image.cache_result, image.steps_skipped) == ("miss", 0)
    np.testing.assert_array_equal(image.pixels, images(draw(None, cached()))["a", 0].pixels)
    assert engine._starts is not None
    assert engine._starts.faults == {"unusable": 1}
    engine._starts._pool.shutdown()
    assert shelf.kept.keys() == {"a"}


@pytest.mark.parametrize("length", [0, 1, 5])
def test_too_few_or_too_many_starts_are_borne(length: int) -> None:
    events = draw(Shelf({"a": [a_start(0.5)] * length}), cached(n=3))
    results = [image.cache_result for _, image in sorted(images(events).items())]
    assert results == ["hit"] * min(length, 3) + ["miss"] * (3 - min(length, 3))


class Broken:
    """A Starts that fails wherever it is called."""

    def find(self, request: ImageRequest, plan: Plan) -> Sequence[Start | None]:
        raise TimeoutError("the store is gone")

    def marks(self, request: ImageRequest, plan: Plan) -> Sequence[int]:
        return (1,) if request.id == "a" else 1 // 0

    def keep(self, request: ImageRequest, latents: Mapping[float, np.ndarray]) -> None:
        raise OSError("the disk is full")


def test_a_cache_that_fails_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    engine = DiffusionEngine(ToyModel(), settings(), starts=Broken())
    for id in ("a", "b"):
        engine.add(cached(id))
    drawn = images(drain(engine))
    assert {image.cache_result for image in drawn.values()} == {"miss"}
    assert drawn.keys() == {("a", 0), ("b", 0)}
    assert engine._starts is not None
    engine._starts._pool.shutdown()
    assert engine._starts.faults == {"lookup": 2, "marks": 1, "keep": 1}
    assert len([record for record in caplog.records if record.name == module.__name__]) == 1


def test_faults_are_counted_and_observed_each_time_and_logged_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    observed: list[str] = []
    guarded = module.GuardedStarts(Broken(), observed.append)
    for _ in range(100):
        assert guarded.marks(request("b"), plan_of("ddim", 5)) == frozenset()
        now[0] += 1.5
    assert guarded.faults == {"marks": 100}
    assert observed == ["marks"] * 100
    lines = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert lines == [f"cache: the latents to keep were not chosen ({count} faults so far)" for count in (1, 41, 81)]


class Hanging(Shelf):
    """A Starts that answers when it is let."""

    def __init__(self) -> None:
        super().__init__({"late": [a_start(0.5)], "after": [a_start(0.5)]}, rows=(1,))
        self.let = threading.Event()

    def find(self, request: ImageRequest, plan: Plan) -> Sequence[Start | None]:
        self.let.wait()
        return super().find(request, plan)

    def keep(self, request: ImageRequest, latents: Mapping[float, np.ndarray]) -> None:
        self.let.wait()
        super().keep(request, latents)


def test_a_cache_that_hangs_holds_no_request_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    monkeypatch.setattr(module, "BACKLOG", 3)
    shelf = Hanging()
    engine = DiffusionEngine(ToyModel(), settings(), starts=shelf)
    ids = ["late", *"bcdef"]
    drawn: dict[tuple[str, int], Image] = {}
    try:
        for id in ids:
            engine.add(cached(id))
            drawn |= images(drain(engine))
    finally:
        shelf.let.set()
    assert [id for id, _ in drawn] == ids
    assert {image.cache_result for image in drawn.values()} == {"miss"}
    assert engine._starts is not None
    assert engine._starts.faults == {"late": 6, "backlog": 3}  # of six to keep, three may wait
    monkeypatch.setattr(module, "PATIENCE_S", 30.0)
    engine._starts._pool.submit(lambda: None).result()
    engine.add(cached("after"))
    assert images(drain(engine))["after", 0].cache_result == "hit"  # it has healed
    engine._starts._pool.shutdown()
    assert shelf.kept.keys() == {"late", "b", "c"}


class Slow(Shelf):
    """A Starts that takes its time to keep."""

    def keep(self, request: ImageRequest, latents: Mapping[float, np.ndarray]) -> None:
        time.sleep(0.2)
        super().keep(request, latents)


def test_settling_waits_for_what_was_handed_over() -> None:
    shelf = Slow({}, rows=(1,))
    engine = DiffusionEngine(ToyModel(), settings(), starts=shelf)
    engine.add(cached("a"))
    drain(engine)
    assert not shelf.kept
    engine.settle(5.0)
    assert shelf.kept.keys() == {"a"}
