from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cache.latent.catalogue import Catalogue
from cache.latent.eviction import FIFO, LCBFU
from cache.latent.keys import Header, KeySpace

SPACE = KeySpace("alice", "shapes@1", "linear", (), (4, 8, 8), 7.5, "")


def header(id: int, prompt: str = "", created: float = 0.0, tenant: str = "alice") -> Header:
    embedding = np.zeros(8, np.float32)
    embedding[id % 8] = 1.0
    space = dataclasses.replace(SPACE, tenant=tenant)
    return Header(id, space, prompt or f"prompt {id}", embedding, created, (0.2, 0.4), (100, 200))


def catalogue(kind: str = "fifo", ttl_s: float | None = None) -> Catalogue:
    evictor = {"fifo": FIFO[tuple[int, float]], "lcbfu": LCBFU[tuple[int, float]]}[kind]()
    return Catalogue(evictor, lambda alpha: 50 * alpha, {} if ttl_s is None else {"alice": ttl_s}, lambda: None)


def test_levels_leave_one_at_a_time_and_the_entry_with_the_last() -> None:
    held = catalogue()
    held.add([header(1), header(2)])
    assert held.evict(1) == [(1, 0.2)]
    assert len(held) == 2
    assert held.tenant("alice").bytes == 500
    assert held.evict(150) == [(1, None)]
    assert len(held) == 1
    assert held.evict(10_000) == [(2, 0.2), (2, None)]
    assert (len(held), held.tenant("alice").bytes) == (0, 0)
    assert held.evict(1) == []


def test_a_key_space_leaves_with_its_last_entry() -> None:
    held = catalogue()
    held.add([header(1)])
    assert held.space(SPACE, 8) is not None
    held.remove(1, 0.2)
    held.remove(1, 0.4)
    assert held.space(SPACE, 8) is None


def test_used_levels_stay_longest() -> None:
    held = catalogue("lcbfu")
    held.add([header(1), header(2)])
    held.hit(1, 0.4)
    held.hit(2, 0.2)
    assert held.evict(300) == [(1, 0.2), (2, 0.4)]
    assert held.evict(1) == [(2, None)]  # one hit on a level that saves less


def test_hits_on_what_has_gone_do_not_bring_it_back() -> None:
    held = catalogue("lcbfu")
    held.add([header(1)])
    held.remove(1, None)
    held.hit(1, 0.4)
    assert held.evict(1000) == []


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_two_servers_keep_the_same_one_of_two(order: tuple[int, int]) -> None:
    held = catalogue()
    gone = [gone for id in order for gone in held.add([header(id, "same", created=5.0)])]
    assert gone == [(1, None)]
    assert [id for id, _ in held.levels()] == [2, 2]


def test_entries_of_one_prompt_in_one_batch() -> None:
    held = catalogue()
    assert held.add([header(1, "same"), header(2, "same", created=1.0), header(3)]) == [(1, None)]
    space = held.space(SPACE, 8)
    assert space is not None
    assert sorted(space.index.ids().tolist()) == [2, 3]


def test_expiry_takes_the_oldest_whatever_their_order_of_arrival() -> None:
    held = catalogue(ttl_s=10.0)
    held.add([header(1, created=5.0), header(2, created=1.0), header(3, created=3.0), header(4, tenant="bob")])
    assert held.expire(12.0) == [(2, None)]
    assert held.expire(14.0) == [(3, None)]
    assert held.expire(1e9) == [(1, None)]
    assert len(held) == 1


def test_purges_remember_a_bounded_number_of_prompts() -> None:
    held = catalogue()
    for i in range(1500):
        held.purge("alice", f"prompt {i}", now=float(i))
    assert len(held.tenant("alice").purged) == 1000
    assert held.add([header(1, "prompt 1400", created=10.0)]) == [(1, None)]
    assert held.add([header(2, "prompt 1400", created=1401.0)]) == []
