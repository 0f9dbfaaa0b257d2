"""What the engine draws and says, on a toy model."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from accel.samplers.library import build_plan
from accel.samplers.noise import gaussian
from service.diffusion.engine import DiffusionEngine, NullObserver
from service.diffusion.request import Completed, Event, Image, ImageRequest, Partial, Progress
from service.errors import DeadlineError, InputError
from service.events import Cancelled, Failed, Started
from tests.service.diffusion.toy import CHANNELS, ToyModel, drain, request, settings


def of(events: list[Event], kind: type) -> list:
    return [event for event in events if isinstance(event, kind)]


def draw(requests: list[ImageRequest], **changes: int | float) -> list[Event]:
    engine = DiffusionEngine(ToyModel(), settings(**changes))
    for each in requests:
        engine.add(each)
    return drain(engine)


def pixels_of(events: list[Event]) -> dict[tuple[str, int], np.ndarray]:
    return {(image.request_id, image.index): image.pixels for image in of(events, Image)}


def mixed_requests(count: int) -> list[ImageRequest]:
    rng = random.Random(4)
    return [
        request(
            f"r{i}",
            sampler=(sampler := rng.choice(["ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "lcm"])),
            steps=rng.randint(1, 12),
            guidance_scale=rng.choice([1.0, 3.0, 7.5]),
            eta=rng.choice([0.0, 0.7]) if sampler == "ddim" else 0.0,
            width=rng.choice([64, 96]),
            height=rng.choice([64, 96]),
            n=rng.choice([1, 1, 1, 3]),
            seed=rng.randrange(2**32),
            negative_prompt=rng.choice(["", "dull"]),
            loras=rng.choice([(), (), (("ink", 0.5),)]),
            priority=rng.randint(-2, 2),
            partial_images=rng.choice([0, 2]),
        )
        for i in range(count)
    ]


def test_every_picture_of_a_mixed_batch_equals_its_solo_run():
    requests = mixed_requests(40)
    rng = random.Random(5)
    model = ToyModel()
    engine = DiffusionEngine(model, settings())
    events: list[Event] = []
    arriving = list(requests)
    while arriving or engine.has_work():
        for _ in range(rng.randint(0, 3)):
            if arriving:
                engine.add(arriving.pop(0))
        events += engine.step()
    together = pixels_of(events)
    assert max(model.calls) > 4  # rows did share ticks
    assert len({image.tobytes() for image in together.values()}) > 40  # and pictures do differ
    for each in requests:
        alone = pixels_of(draw([each]))
        assert len(alone) == each.n
        for key, pixels in alone.items():
            np.testing.assert_array_equal(pixels, together[key])


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m_sde", "lcm"])
def test_a_picture_is_what_its_plan_says(sampler, monkeypatch):
    """The engine against a loop written out here: the plan's rows, noise by seed and row, the toy network."""

    def quiet_plan(*args, **options):  # real samplers start within 0.3% of 1, which no pixel would show
        return replace(build_plan(*args, **options), init_scale=0.4)

    monkeypatch.setattr("service.diffusion.engine.build_plan", quiet_plan)
    one = request(sampler=sampler, steps=6, guidance_scale=2.5, seed=11, eta=0.5 if sampler == "ddim" else 0.0)
    model = ToyModel()
    defaults = model.card.samplers[sampler]
    plan = quiet_plan(
        sampler, model.schedule(sampler), 6, spacing=defaults.spacing, karras=defaults.karras, eta=one.eta
    )
    (condition,) = model.encode([(one.prompt, "")], [2.5], sampler, (64, 64))
    shape, seed = (CHANNELS, 4, 4), torch.tensor([11])
    x = gaussian(seed, -1, shape) * plan.init_scale
    previous = torch.zeros_like(x)
    for index, row in enumerate(plan.rows):
        denoised = model.denoiser(sampler)(x, torch.tensor([row.t]), torch.tensor([row.alpha]), [condition])
        x = row.a * x + row.b * denoised + row.c * previous + row.s * gaussian(seed, index, shape)
        previous = denoised
    expected = model.decode(x)[0].numpy().astype(int)
    pixels = pixels_of(draw([request("company", steps=9), one]))["a", 0]
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_picture_i_of_a_request_is_the_picture_of_seed_plus_i():
    several = pixels_of(draw([request(n=3, seed=2**32 - 1)]))
    for index, seed in enumerate([2**32 - 1, 0, 1]):
        np.testing.assert_array_equal(several["a", index], pixels_of(draw([request(seed=seed)]))["a", 0])


def test_the_events_of_a_request_come_in_order():
    events = draw([request(n=2, steps=4, partial_images=3)])
    assert events[0] == Started("a")
    assert isinstance(events[-1], Completed)
    assert len(of(events, Started)) == len(of(events, Completed)) == 1
    for index in (0, 1):
        mine = [event for event in events[1:-1] if event.index == index]
        assert of(mine, Progress) == [Progress("a", index, step, 4) for step in (1, 2, 3, 4)]
        assert [partial.number for partial in of(mine, Partial)] == [0, 1, 2]
        assert isinstance(mine[-1], Image)
        assert mine[-1].seed == 7 + index


@pytest.mark.parametrize(
    ("steps", "partial_images", "rows"),
    [(10, 1, [5]), (9, 2, [3, 6]), (8, 3, [2, 4, 6]), (3, 3, [1, 2]), (1, 3, []), (20, 0, [])],
)
def test_previews_are_evenly_spaced_and_never_the_last_row(steps, partial_images, rows):
    events = draw([request(steps=steps, partial_images=partial_images)])
    seen = [events[i - 1].step for i, event in enumerate(events) if isinstance(event, Partial)]
    assert seen == rows


def test_a_preview_shows_the_current_estimate():
    events = draw([request(steps=8, partial_images=1)])
    assert of(events, Partial)[0].pixels.shape == (64, 64, 3)
    assert of(events, Partial)[0].pixels.dtype == np.uint8
    assert (of(events, Partial)[0].pixels != of(events, Image)[0].pixels).any()


def test_a_row_without_guidance_costs_one_evaluation():
    model = ToyModel()
    engine = DiffusionEngine(model, settings())
    engine.add(request("plain", steps=6))
    engine.add(request("guided", steps=6, guidance_scale=4.0))
    images = {image.request_id: image for image in of(drain(engine), Image)}
    assert (images["plain"].evaluations, images["guided"].evaluations) == (6, 12)
    assert images["plain"].steps_run == 6
    assert images["plain"].steps_skipped == 0
    assert model.evaluations == 18
    assert model.calls == [3] * 6


def test_no_tick_has_more_network_rows_than_the_limit():
    model = ToyModel()
    engine = DiffusionEngine(model, settings(max_batch=3))
    for i in range(6):
        engine.add(request(str(i), guidance_scale=1.0 + i % 2))
    assert len(of(drain(engine), Completed)) == 6
    assert max(model.calls) == 3


def test_prompts_of_requests_that_start_together_are_encoded_together():
    model = ToyModel()
    engine = DiffusionEngine(model, settings())
    for i in range(4):
        engine.add(request(str(i), n=2))
    engine.add(request("other", width=96))
    drain(engine)
    assert sorted(model.encoded) == [1, 4]


def test_pictures_of_one_request_that_start_apart_are_encoded_once():
    model = ToyModel()
    engine = DiffusionEngine(model, settings(max_running=3))
    engine.add(request(n=8))
    events = drain(engine)
    assert model.encoded == [1]
    assert len(of(events, Started)) == 1
    assert sorted(image.index for image in of(events, Image)) == list(range(8))


@pytest.mark.parametrize("after", range(6))
def test_an_abort_takes_effect_before_the_next_row(after):
    model = ToyModel()
    engine = DiffusionEngine(model, settings())
    engine.add(request("gone", n=3, steps=6, guidance_scale=2.0))
    engine.add(request("stays", steps=6))
    events = []
    for _ in range(after):
        events += engine.step()
    engine.abort("gone")
    before = model.evaluations
    events += engine.step()
    assert model.evaluations - before == 1
    assert len(of(events, Cancelled)) == 1
    events += drain(engine)
    assert {event.request_id for event in of(events, Cancelled)} == {"gone"}
    assert {event.request_id for event in of(events, Completed)} == {"stays"}
    np.testing.assert_array_equal(
        pixels_of(events)["stays", 0], pixels_of(draw([request("stays", steps=6)]))["stays", 0]
    )


def test_an_abort_frees_its_slots():
    engine = DiffusionEngine(ToyModel(), settings(max_running=2))
    engine.add(request("a", n=2, steps=50))
    engine.add(request("b", n=2))
    engine.step()
    engine.abort("a")
    assert Started("b") in engine.step()
    assert {event.request_id for event in of(drain(engine), Completed)} == {"b"}


def test_aborting_what_is_not_there_is_no_error():
    engine = DiffusionEngine(ToyModel(), settings())
    engine.abort("never heard of")
    engine.add(request())
    drain(engine)
    engine.abort("a")
    assert not engine.has_work()


def test_an_id_may_be_used_again_once_its_request_has_ended():
    engine = DiffusionEngine(ToyModel(), settings())
    for _ in range(2):
        engine.add(request())
        assert len(of(drain(engine), Completed)) == 1


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("started", [True, False])
def test_a_deadline_ends_a_request_waiting_or_running(started):
    clock = Clock()
    model = ToyModel()
    engine = DiffusionEngine(model, settings(max_running=1), clock=clock)
    if not started:
        engine.add(request("first", steps=50))
    engine.add(request("late", steps=50, deadline_s=3.0))
    for clock.now in (0.0, 1.0, 2.0, 2.9):
        assert not of(engine.step(), Failed)
    clock.now = 3.0
    (failed,) = of(engine.step(), Failed)
    assert failed.request_id == "late"
    assert isinstance(failed.error, DeadlineError)
    assert failed.timings.total_s == 3.0
    assert [event.request_id for event in of(drain(engine), Completed)] == ([] if started else ["first"])


def test_a_waiting_request_ages_past_more_urgent_ones():
    clock = Clock()
    engine = DiffusionEngine(ToyModel(), settings(max_running=1, ageing_s=10.0), clock=clock)
    engine.add(request("patient", steps=1))
    order = []
    for second in range(40):
        clock.now = float(second)
        engine.add(request(f"urgent-{second}", steps=1, priority=1))
        order += [event.request_id for event in of(engine.step(), Completed)]
    assert order.index("patient") == 10  # behind those that came within ten seconds of it


def test_timings_add_up():
    clock = Clock()
    model = ToyModel()

    def second(network, conditions):
        clock.now += 1.0

    model.on_call = second
    engine = DiffusionEngine(model, settings(max_running=1), clock=clock)
    engine.add(request("a", steps=3))
    engine.add(request("b", steps=2))
    timings = {event.request_id: event.timings for event in of(drain(engine), Completed)}
    assert (timings["a"].queue_s, timings["a"].denoise_s, timings["a"].total_s) == (0.0, 3.0, 3.0)
    assert (timings["b"].queue_s, timings["b"].denoise_s, timings["b"].total_s) == (3.0, 2.0, 5.0)


def test_an_observer_sees_ticks_and_stages():
    class Notes(NullObserver):
        def __init__(self) -> None:
            self.ticks: list[tuple[int, int]] = []
            self.stages: list[str] = []

        def tick(self, pictures: int, evaluations: int, seconds: float) -> None:
            self.ticks.append((pictures, evaluations))

        def stage(self, name: str, seconds: float) -> None:
            self.stages.append(name)

    notes = Notes()
    engine = DiffusionEngine(ToyModel(), settings(), notes)
    engine.add(request(n=2, steps=2, guidance_scale=2.0, partial_images=1))
    drain(engine)
    assert notes.ticks == [(2, 4), (2, 4)]
    assert notes.stages == ["encode", "preview", "decode"]


def test_prompts_of_tenants_are_not_encoded_together():
    model, encoded = ToyModel(), []
    encode = model.encode
    model.encode = lambda *given: (encoded.append((len(given[0]), given[-1])), encode(*given))[1]
    engine = DiffusionEngine(model, settings())
    for id, tenant in (("a", "ada"), ("b", "bob"), ("c", "ada")):
        engine.add(replace(request(id), tenant=tenant))
    drain(engine)
    assert encoded == [(2, "ada"), (1, "bob")]


def test_a_negative_prompt_without_effect_is_told_of():
    engine = DiffusionEngine(ToyModel(), settings())
    engine.add(request("guided", guidance_scale=2.0, negative_prompt="fox"))
    engine.add(request("unguided", guidance_scale=1.0, negative_prompt="fox"))
    warnings = {event.request_id: event.warnings for event in of(drain(engine), Completed)}
    assert warnings["guided"] == ()
    assert warnings["unguided"] == ("negative_prompt: it has no effect on the sampler ddim at guidance_scale 1",)


def test_a_decode_between_ticks_is_bounded():
    model = ToyModel()
    engine = DiffusionEngine(model, settings())
    engine.add(request(n=7))
    drain(engine)
    assert model.decoded == [4, 3]


def test_steps_that_the_sampler_cannot_take_are_refused():
    engine = DiffusionEngine(ToyModel(), settings())
    with pytest.raises(InputError, match="1 to 50"):
        engine.add(request(sampler="lcm", steps=51))
    assert not engine.has_work()
