from __future__ import annotations

import pytest

from cache.prefix.pages import PagePool, PoolEmpty


def test_a_page_is_free_again_when_its_last_holder_lets_go():
    pool = PagePool(3, 16)
    (page,) = pool.allocate(1)
    pool.share(page)
    assert (pool.references(page), pool.writable(page), pool.free) == (2, False, 2)
    assert not pool.release(page)
    assert pool.writable(page)
    assert pool.release(page)
    assert (pool.references(page), pool.free) == (0, 3)


def test_allocation_is_all_or_nothing():
    pool = PagePool(4, 16)
    held = pool.allocate(3)
    assert len(set(held)) == 3
    with pytest.raises(PoolEmpty, match="2 pages wanted, 1 of 4 are free"):
        pool.allocate(2)
    assert pool.free == 1
    assert pool.allocate(0) == []


def test_a_free_page_is_neither_shared_nor_released():
    pool = PagePool(2, 16)
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.share(1)
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.release(1)
    assert pool.free == 2


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_that_tokens_take(tokens: int, pages: int):
    assert PagePool(1, 16).covering(tokens) == pages


def test_the_watermark_is_a_share_of_the_pages_and_at_least_one():
    assert [PagePool(pages, 16).watermark for pages in (1, 2, 100, 101, 1000)] == [0, 1, 1, 2, 10]
    assert PagePool(50, 16, watermark=0).watermark == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pages": 0}, "pages is 0"), ({"page_size": 0}, "page_size is 0"), ({"watermark": 1.0}, "watermark is 1.0")],
)
def test_sizes_out_of_range_are_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PagePool(**{"pages": 4, "page_size": 4, **changes})
