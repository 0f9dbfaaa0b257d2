"""What goes wrong stays with the request it belongs to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import Completed, Event, Image, ImageRequest
from service.errors import HeadstartError, NonFiniteError, OutOfMemoryError, UnavailableError
from service.events import Failed
from tests.service.diffusion.toy import ToyModel, drain, request, settings


def run(model: ToyModel, requests: list[ImageRequest], **changes: int | float) -> tuple[DiffusionEngine, list[Event]]:
    engine = DiffusionEngine(model, settings(**changes))
    for each in requests:
        engine.add(each)
    return engine, drain(engine)


def failures(events: list[Event]) -> dict[str, Exception]:
    return {event.request_id: event.error for event in events if isinstance(event, Failed)}


def completed(events: list[Event]) -> set[str]:
    return {event.request_id for event in events if isinstance(event, Completed)}


def assert_as_alone(events: list[Event], requests: list[ImageRequest]) -> None:
    for each in requests:
        _, alone = run(ToyModel(), [each])
        mine = [event for event in events if isinstance(event, Image) and event.request_id == each.id]
        expected = [event for event in alone if isinstance(event, Image)]
        assert len(mine) == len(expected) == each.n
        for one, other in zip(sorted(mine, key=lambda image: image.index), expected, strict=True):
            np.testing.assert_array_equal(one.pixels, other.pixels)


def assert_still_works(engine: DiffusionEngine) -> None:
    """The engine has all its slots and draws on."""
    engine.add(request("after", n=8))
    engine.add(request("after too", n=8))
    assert completed(drain(engine)) == {"after", "after too"}


def test_a_non_finite_picture_fails_its_request_and_no_other():
    model = ToyModel()
    others = [request("b", n=2), request("c", steps=9)]
    engine, events = run(model, [request("bad", prompt="poison", n=3), *others])
    (error,) = failures(events).values()
    assert isinstance(error, NonFiniteError)
    assert "picture 0" in error.message
    assert completed(events) == {"b", "c"}
    assert_as_alone(events, others)
    assert not [event for event in events if isinstance(event, Image) and event.request_id == "bad"]
    assert_still_works(engine)


def test_a_preview_shows_that_a_picture_is_not_finite_and_ends_it_early():
    model = ToyModel()
    _, events = run(model, [request("bad", prompt="poison", steps=50, partial_images=1)])
    assert isinstance(failures(events)["bad"], NonFiniteError)
    assert model.evaluations == 25


def test_the_slot_of_a_non_finite_picture_serves_the_next():
    model = ToyModel()
    good = request("good")
    _, events = run(model, [request("bad", prompt="poison"), good], max_running=1)
    assert completed(events) == {"good"}
    assert_as_alone(events, [good])


@pytest.mark.parametrize("fit", [1, 2, 3, 5])
def test_running_out_of_memory_splits_the_batch(fit):
    model = ToyModel()
    model.fit = fit
    requests = [request(str(i), steps=4 + i, sampler="euler_a" if i % 2 else "dpmpp_2m") for i in range(6)]
    engine, events = run(model, requests)
    assert completed(events) == {each.id for each in requests}
    assert max(model.calls) <= fit
    assert_as_alone(events, requests)
    assert_still_works(engine)


def test_a_lower_ceiling_is_remembered():
    model = ToyModel()
    tries: list[int] = []
    model.on_call = lambda network, conditions: tries.append(len(conditions))
    model.fit = 2
    run(model, [request(n=8, steps=5)])
    assert [size for size in tries if size > 2] == [8, 4]


def test_a_row_that_does_not_fit_alone_fails_its_request():
    model = ToyModel()
    model.fit = 1
    engine, events = run(model, [request("guided", guidance_scale=3.0, n=2), request("plain")])
    assert isinstance(failures(events)["guided"], OutOfMemoryError)
    assert failures(events)["guided"].status == 503
    assert completed(events) == {"plain"}
    model.fit = None
    assert_still_works(engine)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("could not create a primitive"),
        torch.AcceleratorError("CUDA error: out of memory"),
        MemoryError(),
    ],
)
def test_memory_runs_out_under_other_names_too(error):
    model = ToyModel()

    def allocate(network, conditions):
        if len(conditions) > 1:
            raise error

    model.on_call = allocate
    _, events = run(model, [request(n=4)])
    assert completed(events) == {"a"}


def test_running_out_of_memory_in_decode_splits_it():
    model = ToyModel()
    model.decode_fit = 1
    one = request(n=4)
    _, events = run(model, [one])
    assert_as_alone(events, [one])
    assert model.decoded == [4, 2, 1, 1, 2, 1, 1]


def test_an_exception_in_a_tick_fails_the_requests_of_that_tick_only():
    model = ToyModel()

    def fall_over(network, conditions):
        if network == "student":
            raise ZeroDivisionError("secret detail")

    model.on_call = fall_over
    others = [request("b"), request("c", width=96)]
    engine, events = run(model, [request("bad", sampler="lcm", steps=4), *others])
    error = failures(events)["bad"]
    assert isinstance(error, HeadstartError)
    assert "secret" not in str(error)
    assert completed(events) == {"b", "c"}
    assert_as_alone(events, others)
    assert_still_works(engine)


def test_the_part_of_a_split_tick_that_ran_keeps_its_row():
    """Memory runs out at two rows, then the second of two parts fails for another reason."""
    model = ToyModel()
    model.fit = 1
    seen: list[int] = []

    def second_part_fails(network, conditions):
        seen.append(len(conditions))
        if seen == [2, 1, 1]:
            raise ValueError("once")

    model.on_call = second_part_fails
    first = request("first", steps=3)
    _, events = run(model, [first, request("second", steps=3)])
    assert set(failures(events)) == {"second"}
    assert_as_alone(events, [first])


def test_a_prompt_that_cannot_be_encoded_fails_alone():
    model = ToyModel()
    model.unencodable = {"bad"}
    others = [request("b"), request("c")]
    engine, events = run(model, [request("a", prompt="bad", n=4), *others])
    assert set(failures(events)) == {"a"}
    assert_as_alone(events, others)
    assert_still_works(engine)


def test_a_decoder_that_falls_over_fails_what_it_had():
    model = ToyModel()
    model.undecodable = True
    engine, events = run(model, [request("a"), request("b", steps=9)])
    assert set(failures(events)) == {"a", "b"}
    model.undecodable = False
    assert_still_works(engine)


def test_a_dead_device_is_not_survived():
    """A CUDA error is for ever: the thread that runs the engine must die, and readiness with it."""
    model = ToyModel()

    def assert_on_device(network, conditions):
        raise torch.AcceleratorError("device-side assert triggered")

    model.on_call = assert_on_device
    engine = DiffusionEngine(model, settings())
    engine.add(request())
    with pytest.raises(torch.AcceleratorError):
        engine.step()
    (failed,) = [event for event in engine.fail_all(UnavailableError("dead")) if isinstance(event, Failed)]
    assert failed.request_id == "a"
    assert not engine.has_work()
