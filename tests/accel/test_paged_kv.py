"""Pages of keys and values: layout, copies, and the way to the host and back."""

from __future__ import annotations

import pytest
import torch

from accel.memory.paged_kv import HostPages, PagedKV, page_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def filled(pages: int = 6, dtype: torch.dtype = torch.float32) -> PagedKV:
    """Two layers of random pages."""
    kv = PagedKV(2, pages, 4, 3, 5, dtype, DEVICE)
    generator = torch.Generator().manual_seed(0)
    for tensor in [*kv.keys, *kv.values]:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return kv


def contents(kv: PagedKV) -> torch.Tensor:
    """[N, layers * 2, S, Hkv, D], a copy."""
    return torch.stack([*kv.keys, *kv.values], dim=1).clone()


def test_layers_are_views_of_one_allocation_of_the_size_that_budgets_count_with() -> None:
    kv = PagedKV(3, 7, 16, 2, 8, torch.bfloat16, DEVICE)
    assert len(kv.keys) == len(kv.values) == 3
    assert all(tensor.shape == (7, 16, 2, 8) and tensor.is_contiguous() for tensor in [*kv.keys, *kv.values])
    assert all(not tensor.any() for tensor in [*kv.keys, *kv.values])
    storages = {tensor.untyped_storage().data_ptr() for tensor in [*kv.keys, *kv.values]}
    assert len(storages) == 1
    assert kv.keys[0].untyped_storage().nbytes() == 7 * page_bytes(3, 16, 2, 8, torch.bfloat16)
    assert len({tensor.data_ptr() for tensor in [*kv.keys, *kv.values]}) == 6


@pytest.mark.parametrize("name", ["layers", "pages", "page_size", "kv_heads", "head_dim"])
def test_a_size_that_is_not_positive_is_named(name: str) -> None:
    sizes = {"layers": 1, "pages": 1, "page_size": 1, "kv_heads": 1, "head_dim": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: 0; allowed: at least 1"):
        PagedKV(**sizes, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(0, 1)],
        [(0, 1), (0, 2), (3, 4)],
        [(0, 1), (2, 0)],  # a page that was copied is given to another
        [(0, 1), (1, 2), (2, 3)],
        [(0, 1), (2, 1)],
        [(0, 1), (1, 0), (3, 3)],
    ],
)
def test_pages_are_copied_one_pair_after_the_other(pairs: list[tuple[int, int]], dtype: torch.dtype) -> None:
    kv = filled(dtype=dtype)
    expected = contents(kv)
    for source, target in pairs:
        expected[target] = expected[source].clone()
    kv.copy(pairs)
    assert torch.equal(contents(kv), expected)


@pytest.mark.parametrize("pair", [(0, 6), (-1, 2), (6, 0)])
def test_a_page_out_of_range_is_named_and_nothing_copied(pair: tuple[int, int]) -> None:
    kv = filled()
    before = contents(kv)
    wrong = pair[0] if pair[0] not in range(6) else pair[1]
    with pytest.raises(ValueError, match=f"page: {wrong}; allowed: 0 to 5"):
        kv.copy([(0, 1), pair])
    assert torch.equal(contents(kv), before)


def test_what_was_swapped_out_comes_back_to_any_page() -> None:
    kv = filled()
    host = HostPages(kv, 4)
    before = contents(kv)
    host.swap_out([5, 0, 2], [1, 3, 0])
    for tensor in [*kv.keys, *kv.values]:  # others have the pages meanwhile
        tensor[[5, 0, 2]] = torch.nan
    host.swap_out([1], [2])
    host.swap_in([0, 1], [4, 0])
    host.swap_in([3], [2])
    after = contents(kv)
    for page, source in {0: 5, 1: 1, 2: 0, 3: 3, 4: 2}.items():
        assert torch.equal(after[page], before[source]), page


def test_a_place_holds_what_came_last() -> None:
    kv = filled()
    host = HostPages(kv, 1)
    before = contents(kv)
    host.swap_out([3], [0])
    host.swap_in([0], [1])
    host.swap_out([4], [0])
    host.swap_in([0], [2])
    after = contents(kv)
    assert torch.equal(after[1], before[3])
    assert torch.equal(after[2], before[4])


@pytest.mark.parametrize(
    ("pages", "places", "message"),
    [
        ([6], [0], "page: 6; allowed: 0 to 5"),
        ([0], [-1], "place: -1; allowed: 0 to 1"),
        ([1, 1], [0, 1], r"pages: \[1, 1\]; allowed: each one once"),
        ([0, 1], [1, 1], r"places: \[1, 1\]; allowed: each one once"),
        ([0, 1], [1], "1 places for 2 pages"),
    ],
)
def test_what_cannot_be_swapped_is_named(pages: list[int], places: list[int], message: str) -> None:
    kv = filled()
    host = HostPages(kv, 2)
    before = contents(kv)
    with pytest.raises(ValueError, match=message):
        host.swap_out(pages, places)
    with pytest.raises(ValueError, match=message):
        host.swap_in(places, pages)
    assert torch.equal(contents(kv), before)


def test_nothing_to_swap_is_nothing_done() -> None:
    kv = filled()
    host = HostPages(kv, 2)
    before = contents(kv)
    host.swap_out([], [])
    host.swap_in([], [])
    assert torch.equal(contents(kv), before)


def test_no_place_on_the_host_is_refused() -> None:
    with pytest.raises(ValueError, match="count: 0; allowed: at least 1"):
        HostPages(filled(), 0)
