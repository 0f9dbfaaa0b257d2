"""Keys and values in pages of a fixed number of tokens (PagedAttention, Kwon et al. 2023), on the device and the host.

Who holds a page is known elsewhere (cache.prefix.pages); here are the tensors. Everything takes effect in order with
what was issued before and after it on the current stream, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def page_bytes(layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one page's keys and values in all layers."""
    return layers * 2 * page_size * kv_heads * head_dim * dtype.itemsize


class PagedKV:
    """`pages` pages of `page_size` tokens' keys and values, in all layers; zeros at first.

    Attributes:
        keys, values: for each layer [N, S, Hkv, D]; views of one allocation.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Raises ValueError where a size is not positive, torch.OutOfMemoryError where the device has no room."""
        sizes = {"layers": layers, "pages": pages, "page_size": page_size, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: {value}; allowed: at least 1")
        self.pages, self.page_size = pages, page_size
        # [layers, keys or values, N, S, Hkv, D]: pages of a layer lie side by side, as attention reads them.
        self._memory = torch.zeros(layers, 2, pages, page_size, kv_heads, head_dim, dtype=dtype, device=device)
        self.keys = [layer[0] for layer in self._memory]
        self.values = [layer[1] for layer in self._memory]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (from, to) in all layers, as if one pair after the other.

        Raises:
            ValueError: a page out of range; nothing was copied.
        """
        _require("page", [page for pair in pairs for page in pair], self.pages)
        sources: list[int] = []
        targets: list[int] = []
        for source, target in pairs:
            if source in targets or target in targets:  # what is at hand is read before it is written: do it first
                self.write(targets, self.read(sources))
                sources, targets = [], []
            sources.append(source)
            targets.append(target)
        if targets:
            self.write(targets, self.read(sources))

    def read(self, pages: Sequence[int]) -> torch.Tensor:
        """[n, layers, 2, S, Hkv, D], contiguous: a copy of pages."""
        return torch.index_select(self._memory.movedim(2, 0), 0, self._index(pages))

    def write(self, pages: Sequence[int], contents: torch.Tensor) -> None:
        """Overwrite distinct pages with what `read` returned."""
        self._memory.index_copy_(2, self._index(pages), contents.movedim(0, 2))

    def _index(self, pages: Sequence[int]) -> torch.Tensor:
        device = self._memory.device
        return torch.tensor(pages, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class HostPages:
    """Places in host memory for `count` pages of a PagedKV.

    On CUDA the memory is pinned and has a stream of its own. A page that is swapped out is first copied aside on the
    device, so that it may be used again at once while its content is on the way to the host.
    """

    def __init__(self, kv: PagedKV, count: int) -> None:
        """Raises ValueError if count is not positive, RuntimeError if so much host memory cannot be had or pinned."""
        if count < 1:
            raise ValueError(f"count: {count}; allowed: at least 1")
        self.count = count
        self._kv = kv
        page = kv.read([0])[0]
        cuda = page.device.type == "cuda"
        self._memory = torch.empty(count, *page.shape, dtype=page.dtype, pin_memory=cuda)
        self._stream = torch.cuda.Stream(page.device) if cuda else None

    def swap_out(self, pages: Sequence[int], places: Sequence[int]) -> None:
        """Copy page pages[i] to places[i]. Raises ValueError: out of range, named twice, or not as many."""
        self._check(pages, places)
        if not pages:
            return
        aside = self._kv.read(pages)
        if self._stream is None:
            self._memory[torch.tensor(places)] = aside
            return
        self._stream.wait_stream(torch.cuda.current_stream(aside.device))
        with torch.cuda.stream(self._stream):
            for place, page in zip(places, aside, strict=True):
                self._memory[place].copy_(page, non_blocking=True)
        aside.record_stream(self._stream)  # its memory is not given to others before that is done

    def swap_in(self, places: Sequence[int], pages: Sequence[int]) -> None:
        """Copy places[i] to page pages[i], with what the last swap_out to it brought. Raises as swap_out."""
        self._check(pages, places)
        if not pages:
            return
        if self._stream is None:
            self._kv.write(pages, self._memory[torch.tensor(places)])
            return
        current = torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(self._stream):  # after the swap_outs, as they were issued there
            aside = torch.empty(
                len(places), *self._memory.shape[1:], dtype=self._memory.dtype, device=self._stream.device
            )
            for place, page in zip(places, aside, strict=True):
                page.copy_(self._memory[place], non_blocking=True)
        current.wait_stream(self._stream)
        self._kv.write(pages, aside)
        aside.record_stream(current)

    def _check(self, pages: Sequence[int], places: Sequence[int]) -> None:
        if len(pages) != len(places):
            raise ValueError(f"{len(places)} places for {len(pages)} pages; allowed: as many")
        for name, numbers, below in (("page", pages, self._kv.pages), ("place", places, self.count)):
            _require(name, numbers, below)
            if len(set(numbers)) < len(numbers):
                raise ValueError(f"{name}s: {list(numbers)}; allowed: each one once")


def _require(name: str, numbers: Sequence[int], below: int) -> None:
    for number in numbers:
        if not 0 <= number < below:
            raise ValueError(f"{name}: {number}; allowed: 0 to {below - 1}")
