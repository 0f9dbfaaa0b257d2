from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.latent.keys import KeySpace, guidance_bucket, random_id

SPACE = KeySpace("alice", "shapes@1", "linear", (("ink", 0.5),), (4, 32, 32), 7.5, "blurry")

spaces = st.builds(
    KeySpace,
    tenant=st.text(),
    model=st.text(),
    family=st.text(),
    loras=st.lists(st.tuples(st.text(), st.floats(-4, 4)), max_size=2).map(tuple),
    shape=st.tuples(*[st.integers(1, 512)] * 3),
    guidance=st.floats(0, 30).map(guidance_bucket),
    negative_prompt=st.text(),
)


@given(spaces)
def test_json_brings_a_space_back(space: KeySpace) -> None:
    assert KeySpace.from_json(space.to_json()) == space
    assert KeySpace.from_json(space.to_json()).digest == space.digest


@given(spaces, spaces)
def test_digests_are_equal_for_equal_text_only(one: KeySpace, other: KeySpace) -> None:
    assert (one.digest == other.digest) == (one.to_json() == other.to_json())


def test_the_digest_is_the_same_in_every_process() -> None:
    assert SPACE.digest.hex() == "3744977954cd09a87a9876a0eeb5a9d8"


def test_a_whole_number_and_its_float_are_one_space() -> None:
    assert dataclasses.replace(SPACE, guidance=7).digest == dataclasses.replace(SPACE, guidance=7.0).digest


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "bob"},
        {"model": "shapes@2"},
        {"family": "cosine"},
        {"loras": ()},
        {"loras": (("ink", 0.6),)},
        {"shape": (4, 32, 40)},
        {"guidance": 8.0},
        {"negative_prompt": ""},
    ],
)
def test_every_field_separates(change: dict[str, Any]) -> None:
    assert dataclasses.replace(SPACE, **change).digest != SPACE.digest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shape": [1, 2]}'])
def test_text_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        KeySpace.from_json(text)


def test_guidance_is_bucketed_by_halves() -> None:
    assert [guidance_bucket(g) for g in (0, 1.1, 7.3, 7.5, 7.76)] == [0.0, 1.0, 7.5, 7.5, 8.0]


def test_ids_are_63_bits_and_do_not_repeat() -> None:
    ids = [random_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(0 <= id < 2**63 for id in ids)
