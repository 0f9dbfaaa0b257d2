"""Pages of key-value memory: who holds them, and which may be written.

A page is a number below `pages`; the tensors behind it are someone else's. It is free while no one holds it. Every
holder, a sequence or a node of the prefix tree, counts as one reference; a page may be written by its holder while that
is the only one, and is copied first otherwise (copy-on-write, as in PagedAttention, Kwon et al. 2023).
"""

from __future__ import annotations

import math


class PoolEmpty(Exception):  # noqa: N818 - a state of the pool, not a fault
    """Fewer pages are free than were asked for."""


class PagePool:
    """Reference counts of pages, and the free ones.

    Args:
        page_size: tokens a page.
        watermark: share of the pages that admission leaves free, so that running sequences can grow.
    """

    def __init__(self, pages: int, page_size: int, watermark: float = 0.01) -> None:
        if pages < 1:
            raise ValueError(f"pages is {pages}, expected at least 1")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}, expected at least 1 token")
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark is {watermark}, expected a share from 0 to below 1")
        self.pages = pages
        self.page_size = page_size
        self.watermark = math.ceil(watermark * pages) if pages > 1 else 0  # pages
        self._references = [0] * pages
        self._free = list(range(pages - 1, -1, -1))  # the page freed last is given first: it may still be in a cache

    @property
    def free(self) -> int:
        return len(self._free)

    def covering(self, tokens: int) -> int:
        """How many pages so many tokens take."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """So many pages, each with one reference. Raises PoolEmpty, and then takes none."""
        if count > len(self._free):
            raise PoolEmpty(f"{count} pages wanted, {len(self._free)} of {self.pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, page: int) -> None:
        """One holder more of a page that is held."""
        if self._references[page] == 0:
            raise ValueError(f"page {page} is free, and cannot be shared")
        self._references[page] += 1

    def release(self, page: int) -> bool:
        """One holder less. True if it was the last, and the page is free now."""
        left = self._references[page] - 1
        if left < 0:
            raise ValueError(f"page {page} is free, and cannot be released")
        self._references[page] = left
        if left == 0:
            self._free.append(page)
        return left == 0

    def references(self, page: int) -> int:
        return self._references[page]

    def writable(self, page: int) -> bool:
        """Whether its holder may write to it: no one else reads it."""
        return self._references[page] == 1
