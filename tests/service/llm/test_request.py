from __future__ import annotations

import math

import pytest

from service.errors import InputError
from service.llm.request import LlmRequest, SamplingParams, State, Usage


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("stop", ("end", "")),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("logprobs", 21),
    ],
)
def test_parameters_out_of_range_are_named(field: str, value: object):
    with pytest.raises(InputError, match=f"^{field}: .* is not allowed; ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", ()),
        ("n", 0),
        ("n", 129),
        ("priority", 11),
        ("deadline_s", 0.0),
        ("deadline_s", math.inf),
    ],
)
def test_requests_out_of_range_are_named(field: str, value: object):
    with pytest.raises(InputError, match=f"^{field}: ") as caught:
        LlmRequest(**{"id": "x", "tokens": (1,), "params": SamplingParams(), field: value})
    assert caught.value.param == field


def test_the_edges_are_allowed():
    SamplingParams(temperature=0, top_p=1, min_p=1, repetition_penalty=10, logprobs=0, seed=2**32 - 1, max_tokens=1)
    SamplingParams(temperature=2, logprobs=20)
    LlmRequest(id="x", tokens=(1,), params=SamplingParams(), n=128, priority=-10, deadline_s=0.001)


def test_usage_adds_up():
    assert Usage(prompt=7, completion=5, cached=4).total == 12


def test_terminal_states_are_those_that_nothing_leaves():
    assert {state for state in State if state.terminal} == {State.ENDED, State.FAILED, State.CANCELLED}
