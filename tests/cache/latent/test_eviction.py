"""cache/latent/eviction.py against naive models that sort everything anew."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.latent.eviction import EVICTORS, LCBFU


@dataclass(frozen=True)
class Payload:
    """An item with no order: comparing two fails."""

    name: int


@dataclass
class Record:
    size: int
    value: float
    serial: int
    used: int
    hits: int = 0


@dataclass
class Naive:
    """Every policy by its definition."""

    policy: str
    records: dict[Hashable, Record] = field(default_factory=dict)
    clock: int = 0

    def add(self, item: Hashable, size: int, value: float) -> None:
        self.clock += 1
        self.records[item] = Record(size, value, self.clock, self.clock)

    def hit(self, item: Hashable) -> None:
        self.clock += 1
        if item in self.records:
            self.records[item].hits += 1
            self.records[item].used = self.clock

    def score(self, record: Record) -> float:
        return {
            "lcbfu": record.hits * record.value,
            "lru": record.used,
            "lfu": record.hits,
            "fifo": record.serial,
        }[self.policy]

    def victims(self, needed: int) -> list[Hashable]:
        order = sorted(self.records, key=lambda item: (self.score(self.records[item]), self.records[item].serial))
        found: list[Hashable] = []
        while order and needed > 0:
            found.append(order.pop(0))
            needed -= self.records.pop(found[-1]).size
        return found


NAMES = st.integers(0, 12).map(Payload)
OPERATIONS = st.one_of(
    st.tuples(st.just("add"), NAMES, st.integers(0, 50), st.sampled_from([0.0, 5.0, 10.0, 15.0, 20.0, 25.0])),
    st.tuples(st.just("hit"), NAMES),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("victims"), st.integers(0, 120)),
)


@pytest.mark.parametrize("policy", sorted(EVICTORS))
@given(operations=st.lists(OPERATIONS, max_size=80))
def test_the_same_items_leave_in_the_same_order_as_by_definition(
    policy: str, operations: list[tuple[object, ...]]
) -> None:
    evictor, naive = EVICTORS[policy](), Naive(policy)
    for operation in operations:
        match operation:
            case ("add", item, int(size), float(value)):
                evictor.add(item, size, value)
                naive.add(item, size, value)
            case ("hit", item):
                assert evictor.hit(item) == (item in naive.records)
                naive.hit(item)
            case ("remove", item):
                assert evictor.remove(item) == (naive.records.pop(item, None) is not None)
            case ("victims", int(needed)):
                assert evictor.victims(needed) == naive.victims(needed)
        assert evictor.total_bytes == sum(record.size for record in naive.records.values())
        assert len(evictor) == len(naive.records)
    assert evictor.victims(10**9) == naive.victims(10**9)
    assert len(evictor) == evictor.total_bytes == 0


def test_lcbfu_weighs_uses_with_the_steps_that_they_save() -> None:
    evictor: LCBFU[str] = LCBFU()
    for item, value, hits in [("deep", 25, 1), ("shallow", 5, 4), ("never", 25, 0), ("often", 5, 6)]:
        evictor.add(item, 10, value)
        for _ in range(hits):
            evictor.hit(item)
    assert evictor.victims(40) == ["never", "shallow", "deep", "often"]


def test_as_few_leave_as_free_what_is_needed() -> None:
    evictor: LCBFU[str] = LCBFU()
    for item in "abc":
        evictor.add(item, 10, 5)
    assert evictor.victims(0) == []
    assert evictor.victims(11) == ["a", "b"]
    assert evictor.total_bytes == 10


def test_many_hits_do_not_make_the_heap_grow() -> None:
    evictor: LCBFU[int] = LCBFU()
    for item in range(100):
        evictor.add(item, 1, 5)
    for _ in range(100):
        for item in range(100):
            evictor.hit(item)
    assert len(evictor._heap) <= 2 * 100 + 64
    assert evictor.victims(3) == [0, 1, 2]


@pytest.mark.parametrize(("size", "value"), [(-1, 5.0), (1, -5.0), (1, float("nan")), (1, float("inf"))])
def test_sizes_and_values_without_an_order_are_refused(size: int, value: float) -> None:
    evictor: LCBFU[str] = LCBFU()
    with pytest.raises(ValueError, match=r"^(size|value) is"):
        evictor.add("a", size, value)
    assert len(evictor) == 0
