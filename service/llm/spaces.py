"""What the scheduler asks of the memory for keys and values. A space knows pages and slots, not tensors.

A space only keeps books; what must happen to the memory itself is told in `Moves`, which travel with the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from service.llm.request import Sequence


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
