"""No tenant can find, count, purge or time what is another's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.latent.index import Index
from cache.latent.keys import KeySpace
from cache.latent.lookup import LatentCache
from cache.latent.policy import nirvana
from cache.latent.store import MemoryStore
from tests.cache.latent.test_lookup import LEVELS, ROWS, SPACE, latents, unit

TENANTS = ("alice", "bob", "carol")

operations = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "insert", "find", "purge prompt", "purge"]),
        st.sampled_from(TENANTS),
        st.integers(0, 3),
    ),
    max_size=25,
)


def space_of(tenant: str) -> KeySpace:
    return dataclasses.replace(SPACE, tenant=tenant)


def find(cache: LatentCache, tenant: str, prompt: int) -> Any:
    return cache.find(space_of(tenant), unit(prompt), "solver", ROWS, 1, 0)[0]


@settings(max_examples=60, deadline=None)
@given(operations)
def test_whatever_tenants_do_each_sees_its_own_alone(steps: list[tuple[str, str, int]]) -> None:
    """Each latent carries its owner's number and its prompt's; a model of dictionaries says what must be there."""
    cache = LatentCache(MemoryStore(), 10**8, nirvana(LEVELS), seed=1)
    expected: dict[str, set[int]] = {tenant: set() for tenant in TENANTS}
    for operation, tenant, prompt in steps:
        mine = expected[tenant]
        if operation == "insert":
            value = float(10 * TENANTS.index(tenant) + prompt)
            assert cache.insert(space_of(tenant), f"prompt {prompt}", unit(prompt), latents(value, (0.5,)))
            assert cache.flush(5.0)
            mine.add(prompt)
        elif operation == "find":
            found = find(cache, tenant, prompt)
            assert (found is not None) == (prompt in mine)
            if found is not None:
                assert found.latent.flat[0] == np.float16(10 * TENANTS.index(tenant) + prompt + 0.5)
        else:
            doomed = {prompt} & mine if operation == "purge prompt" else set(mine)
            assert cache.purge(tenant, f"prompt {prompt}" if operation == "purge prompt" else None) == len(doomed)
            mine -= doomed
        for name in TENANTS:
            assert cache.stats(name).entries == len(expected[name])
            assert (cache.stats(name).bytes > 0) == bool(expected[name])
    for name in TENANTS:
        for prompt in range(4):
            assert (find(cache, name, prompt) is not None) == (prompt in expected[name])
    cache.close()


def test_a_tenants_figures_do_not_move_with_anothers_lookups() -> None:
    cache = LatentCache(MemoryStore(), 10**8, nirvana(LEVELS), seed=1)
    cache.insert(space_of("bob"), "prompt", unit(0), latents(0.0))
    assert cache.flush(5.0)
    before = cache.stats("alice")
    assert find(cache, "bob", 0) is not None
    assert find(cache, "bob", 1) is None
    assert cache.stats("alice") == before
    cache.close()


def test_a_lookup_does_no_work_that_depends_on_other_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its searches and reads are the same whether or not others hold the very prompt."""
    work: list[tuple[str, int]] = []

    class WatchedStore(MemoryStore):
        def get(self, id: int, level: float) -> Any:
            work.append(("get", 0))
            return super().get(id, level)

    search = Index.search

    def watched(self: Index, vector: Any, k: int) -> Any:
        work.append(("search", len(self)))
        return search(self, vector, k)

    monkeypatch.setattr(Index, "search", watched)
    cache = LatentCache(WatchedStore(), 10**8, nirvana(LEVELS), seed=1)
    cache.insert(space_of("alice"), "own", unit(1), latents(0.0))
    assert cache.flush(5.0)
    done = []
    for others in range(2):
        for prompt in range(50 * others):
            cache.insert(space_of("bob"), f"prompt {prompt}", unit(prompt), latents(0.0, (0.5,)))
        assert cache.flush(10.0)
        for tenant, prompt in [("alice", 0), ("alice", 1), ("dave", 0)]:
            work.clear()
            find(cache, tenant, prompt)
            done.append(list(work))
    assert done[:3] == done[3:]
    assert done[0] == [("search", 1)]
    assert done[1] == [("search", 1), ("get", 0)]
    assert done[2] == []
    cache.close()
