"""What the scheduler asks of the memory for keys and values. A space knows pages and slots, not tensors.

A space only keeps books; what must happen to the memory itself is told in `Moves`, which travel with the batch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cache.prefix.pages import PagePool
from cache.prefix.radix import Match, RadixTree
from service.llm.request import Sequence

NO_MATCH = Match(None, [], 0)


@dataclass(slots=True)
class Moves:
    """What must happen to the memory before a batch writes to it, in the order of the fields.

    No page is the target of two moves. A batch swaps out or in, never both, so host places do not change hands in it.
    """

    frees: list[int] = field(default_factory=list)  # slots of a virtual space that ended since the last batch
    swap_outs: list[tuple[int, int]] = field(default_factory=list)  # (page, host place)
    swap_ins: list[tuple[int, int]] = field(default_factory=list)  # (host place, page)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from page, to page)


class KvSpace(Protocol):
    """Memory for the keys and values of sequences, as the scheduler sees it.

    A method that answers False has changed nothing that a sequence holds; it may have evicted cached prefixes.
    """

    @property
    def capacity(self) -> int:
        """Tokens that one sequence alone can hold."""
        ...

    @property
    def shares(self) -> bool:
        """Whether sequences can share memory: then the choices of a request read its prompt once and fork."""
        ...

    def cached(self, sequence: Sequence) -> int:
        """How many tokens of a waiting sequence are in memory already."""
        ...

    def admit(self, sequence: Sequence, alone: bool) -> bool:
        """Give a sequence memory for all its tokens; sets `computed` to what is in memory already.

        alone: nothing else runs, so it need not leave room for anyone's growth.
        """
        ...

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Make positions [computed, length) of a running sequence writable, by it alone."""
        ...

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a new sequence share all that its parent has computed."""
        ...

    def keep(self, sequence: Sequence) -> None:
        """What a running sequence has computed may be found by others from now on."""
        ...

    def release(self, sequence: Sequence, keep: bool) -> None:
        """Take everything from a sequence; keep: what it has computed may still be found, until it is evicted."""
        ...

    def swap_out(self, sequence: Sequence) -> bool:
        """Take a sequence's memory and put what it has computed on the host."""
        ...

    def swap_in(self, sequence: Sequence, alone: bool) -> bool:
        """Give a swapped sequence memory for all its tokens, and what it has computed back."""
        ...

    def moves(self) -> Moves:
        """What has to be moved since the last call."""
        ...


class PagedSpace:
    """Pages shared by reference count and copied on write (PagedAttention), found again by prefix (RadixAttention).

    Args:
        pool: of the pages; its watermark is left free by admission.
        tree: of prefixes in the same pool; None: nothing is kept of sequences that have ended.
        places: pages on the host, for sequences that are swapped out.
    """

    shares = True

    def __init__(self, pool: PagePool, tree: RadixTree | None = None, places: int = 0) -> None:
        self._pool = pool
        self._tree = tree
        self._places = list(range(places - 1, -1, -1))
        self._holders = 0  # sequences that hold pages
        self._moves = Moves()

    @property
    def capacity(self) -> int:
        return self._pool.pages * self._pool.page_size

    def cached(self, sequence: Sequence) -> int:
        if self._tree is None:
            return 0
        tokens = sequence.request.tokens
        return min(self._tree.length(tokens, sequence.request.salt), len(tokens) - 1)

    def admit(self, sequence: Sequence, alone: bool) -> bool:
        pool = self._pool
        match = NO_MATCH
        if self._tree is not None:  # the last token is computed in any case: its logits are wanted
            match = self._tree.match(tuple(sequence.tokens[:-1]), sequence.request.salt)
        self._lock(match)
        shared = match.length // pool.page_size  # pages; one in which the match ends is copied
        pages = self._allocate(pool.covering(len(sequence.tokens)) - shared, alone)
        if pages is None:
            self._unlock(match)
            if not (alone and match.length):
                return False
            # What the lock held beside the match may be all that was missing.
            match, shared = NO_MATCH, 0
            pages = self._allocate(pool.covering(len(sequence.tokens)), alone)
            if pages is None:
                return False
        for page in match.pages[:shared]:
            pool.share(page)
        if match.length % pool.page_size:
            self._moves.copies.append((match.pages[shared], pages[0]))
        sequence.pages = match.pages[:shared] + pages
        sequence.computed, sequence.node = match.length, match.node
        self._holders += 1
        return True

    def grow(self, sequence: Sequence, length: int) -> bool:
        new, copy = self._missing(sequence, length)
        if not (new or copy):
            return True
        if new + copy > self._pool.free:
            self._evict(sequence, new + copy)
            new, copy = self._missing(sequence, length)  # evicting may have left a shared page to the sequence alone
            if new + copy > self._pool.free:
                return False
        pages = self._pool.allocate(new + copy)
        if copy:
            at = sequence.computed // self._pool.page_size
            old, sequence.pages[at] = sequence.pages[at], pages.pop()
            self._moves.copies.append((old, sequence.pages[at]))
            self._pool.release(old)
        sequence.pages += pages
        return True

    def fork(self, parent: Sequence, child: Sequence) -> None:
        child.pages = parent.pages[: self._pool.covering(parent.computed)]
        for page in child.pages:
            self._pool.share(page)
        child.computed, child.node = parent.computed, parent.node
        if self._tree is not None and child.node is not None:
            self._tree.lock(child.node)
        self._holders += 1

    def keep(self, sequence: Sequence) -> None:
        """Only whole pages: the sequence still writes to the last one."""
        whole = sequence.computed // self._pool.page_size
        if self._tree is None or not whole:
            return
        tokens = tuple(sequence.tokens[: whole * self._pool.page_size])
        match = self._tree.insert(tokens, sequence.pages[:whole], sequence.request.salt)
        for at, page in enumerate(match.pages):
            if page != sequence.pages[at]:  # another sequence computed the same meanwhile: one copy will do
                self._pool.share(page)
                self._pool.release(sequence.pages[at])
                sequence.pages[at] = page
        self._lock(match)
        if sequence.node is not None:
            self._tree.unlock(sequence.node)
        sequence.node = match.node

    def release(self, sequence: Sequence, keep: bool) -> None:
        if keep and self._tree is not None and sequence.pages:
            tokens = tuple(sequence.tokens[: sequence.computed])
            self._tree.insert(tokens, sequence.pages[: self._pool.covering(len(tokens))], sequence.request.salt)
        self._places += sequence.places
        sequence.places = []
        self._take(sequence)
        sequence.computed = 0

    def swap_out(self, sequence: Sequence) -> bool:
        count = self._pool.covering(sequence.computed)
        if not 0 < count <= len(self._places):
            return False
        sequence.places = [self._places.pop() for _ in range(count)]
        self._moves.swap_outs += zip(sequence.pages, sequence.places, strict=False)  # the pages behind are empty yet
        self._take(sequence)
        return True

    def swap_in(self, sequence: Sequence, alone: bool) -> bool:
        pages = self._allocate(self._pool.covering(len(sequence.tokens)), alone)
        if pages is None:
            return False
        self._moves.swap_ins += zip(sequence.places, pages, strict=False)
        self._places += sequence.places
        sequence.pages, sequence.places = pages, []
        self._holders += 1
        return True

    def moves(self) -> Moves:
        moves, self._moves = self._moves, Moves()
        return moves

    def _missing(self, sequence: Sequence, length: int) -> tuple[int, int]:
        """Pages wanted for growing to a length: new ones, and one if the page written next is read by others."""
        size = self._pool.page_size
        at, inside = divmod(sequence.computed, size)
        copy = inside and not self._pool.writable(sequence.pages[at])
        return max(0, -(-length // size) - len(sequence.pages)), int(copy)

    def _allocate(self, count: int, alone: bool) -> list[int] | None:
        """Pages for a sequence that comes in, so that the watermark stays free unless it is alone; None: no room."""
        wanted = count if alone else count + self._pool.watermark
        short = wanted - self._pool.free
        if short > 0 and self._tree is not None and short <= self._tree.evictable:
            self._tree.evict(short)
        return self._pool.allocate(count) if wanted <= self._pool.free else None

    def _evict(self, sequence: Sequence, wanted: int) -> None:
        """Make so many pages free for a running sequence, if that can be."""
        if self._tree is None:
            return
        self._tree.evict(wanted - self._pool.free)
        if wanted > self._pool.free and self._holders == 1 and sequence.node is not None:
            # It is alone: what the tree holds beside the sequence's own pages can go as well.
            self._tree.unlock(sequence.node)
            sequence.node = None
            self._tree.evict(wanted - self._pool.free)

    def _take(self, sequence: Sequence) -> None:
        if not sequence.pages:
            return
        for page in sequence.pages:
            self._pool.release(page)
        sequence.pages = []
        if self._tree is not None and sequence.node is not None:
            self._tree.unlock(sequence.node)
        sequence.node = None
        self._holders -= 1

    def _lock(self, match: Match) -> None:
        if self._tree is not None and match.node is not None:
            self._tree.lock(match.node)

    def _unlock(self, match: Match) -> None:
        if self._tree is not None and match.node is not None:
            self._tree.unlock(match.node)


class _Unshared:
    """What spaces have in common in which every sequence has memory of its own, and is only ever computed again."""

    shares = False

    def cached(self, sequence: Sequence) -> int:
        return 0

    def fork(self, parent: Sequence, child: Sequence) -> None:
        raise NotImplementedError("sequences of this space share no memory")

    def keep(self, sequence: Sequence) -> None:
        pass

    def swap_out(self, sequence: Sequence) -> bool:
        return False

    def swap_in(self, sequence: Sequence, alone: bool) -> bool:
        raise NotImplementedError("nothing is swapped out of this space")


class ReservedSpace(_Unshared):
    """Pages for the longest that a sequence may become, reserved when it starts (Orca, Yu et al. 2022): a baseline."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool

    @property
    def capacity(self) -> int:
        return self._pool.pages * self._pool.page_size

    def admit(self, sequence: Sequence, alone: bool) -> bool:
        request = sequence.request
        pages = self._pool.covering(len(request.tokens) + request.params.max_tokens)
        if pages > self._pool.free:
            return False
        sequence.pages = self._pool.allocate(pages)
        return True

    def grow(self, sequence: Sequence, length: int) -> bool:
        return True

    def release(self, sequence: Sequence, keep: bool) -> None:
        for page in sequence.pages:
            self._pool.release(page)
        sequence.pages = []
        sequence.computed = 0

    def moves(self) -> Moves:
        return Moves()


class VirtualSpace(_Unshared):
    """Slots that are contiguous in virtual memory, their lengths against a budget of physical pages (vAttention).

    Args:
        slots: how many sequences there is address space for.
        max_length: tokens a slot.
        pages: the budget.
        pages_for: physical pages that so many tokens of one slot take.
        watermark: share of the budget that admission leaves free.
    """

    def __init__(
        self, slots: int, max_length: int, pages: int, pages_for: Callable[[int], int], watermark: float = 0.01
    ) -> None:
        self._slots = list(range(slots - 1, -1, -1))  # the slot freed last goes first: its pages may still be mapped
        self._free = pages
        self._pages_for = pages_for
        self._watermark = math.ceil(watermark * pages)
        self._held: dict[int, int] = {}  # pages, by slot
        self._moves = Moves()
        # The longest sequence whose pages are within the budget.
        self.capacity = bisect.bisect_right(range(1, max_length + 1), pages, key=pages_for)

    def admit(self, sequence: Sequence, alone: bool) -> bool:
        pages = self._pages_for(len(sequence.tokens))
        if not self._slots or pages > self._free - (0 if alone else self._watermark):
            return False
        sequence.slot = self._slots.pop()
        self._held[sequence.slot] = pages
        self._free -= pages
        return True

    def grow(self, sequence: Sequence, length: int) -> bool:
        more = self._pages_for(length) - self._held[sequence.slot]
        if more > self._free:
            return False
        if more > 0:
            self._held[sequence.slot] += more
            self._free -= more
        return True

    def release(self, sequence: Sequence, keep: bool) -> None:
        self._free += self._held.pop(sequence.slot)
        self._slots.append(sequence.slot)
        self._moves.frees.append(sequence.slot)
        sequence.slot = -1
        sequence.computed = 0

    def moves(self) -> Moves:
        moves, self._moves = self._moves, Moves()
        return moves
