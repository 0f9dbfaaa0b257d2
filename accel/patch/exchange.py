"""What the layers of the ranks tell one another, kept for each picture until its next step.

A layer calls `swap(layer, fresh)`: it gives what the others need of its part and gets what all parts have given. In a
synchronous call that is what they give now. In a displaced call it is what they gave at the picture's step before, and
what is given now is on its way behind the computation until the next step (Li et al. 2024, section 4).

Shapes: R rows of a call, n parts, S rows held, P 8-byte words that a group of layers sends for one row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from accel.patch.mesh import Team

# What differs between the modes is what is done after warm-up; the last four are the paper's ablations.
MODES = ("displaced", "full_sync", "stale_gn", "separate_gn", "sync_gn", "no_sync")
GROUP_BYTES = 4 << 20  # of one rank: an all-gather of this size takes the time of three of the smallest
_ALIGNED_WORDS = 2  # 16 bytes, so that any dtype may be read in place

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class _Layer:
    """Where a layer's words lie in those of its group, and what they are."""

    group: _Group
    offset: int
    words: int
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one row


@dataclass(slots=True, eq=False)
class _Group:
    """Layers that send together, in the order in which they run."""

    words: int = 0
    layers: int = 0
    packed: int = 0  # layers of this call that have packed
    known: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [S, n, P] int64
    sent: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # [most R, P] int64
    arrive: Callable[[], None] | None = None  # makes the computation wait for what is on its way


class Exchange:
    """The exchange of one team, for pictures of one latent shape.

    Which layers there are is learned in the first call, which is synchronous. All ranks of the team must make the same
    calls in the same order.

    Args:
        mode: one of MODES.
        group_bytes: layers send together until they have so much for one row.
    """

    def __init__(
        self, team: Team, device: torch.device, mode: str = "displaced", group_bytes: int = GROUP_BYTES
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: {mode!r}; allowed: {', '.join(MODES)}")
        self._team = team
        self.place = team.place
        self._device = device
        self._keeps = mode != "full_sync"
        self._sends = mode not in ("full_sync", "no_sync")
        self._group_words = group_bytes // 8
        self._layers: dict[int, _Layer] = {}
        self._groups: list[_Group] = []
        self._learned: list[tuple[int, torch.dtype, torch.Size, torch.Tensor]] = []  # by layer, its words of all parts
        self._row_of: dict[int, int] = {}  # by slot
        self._free: list[int] = []
        self._indices: dict[int, tuple[tuple[int, ...], torch.Tensor]] = {}  # by R: rows, and the same on the device
        self._rows = torch.empty(0, dtype=torch.int64)  # [R], of this call
        self._gathered = torch.empty(0, dtype=torch.int64, device=device)
        self._synchronous = True
        self._whole = False  # this call's rows are all that are held, in their order
        self._version = next(_numbers)  # of the buffers' addresses, unlike any other exchange's

    def __len__(self) -> int:
        """Slots that hold state."""
        return len(self._row_of)

    @property
    def row_bytes(self) -> int:
        """What a row of a displaced call sends to each other rank."""
        return 8 * sum(group.words for group in self._groups) if self._sends else 0

    @property
    def state(self) -> tuple[object, ...]:
        """All that a call depends on besides the contents of buffers: a CUDA graph is replayed only at its own."""
        return self._version, self._whole, self._synchronous

    @property
    def learns(self) -> bool:
        """The call at hand is the first, which shows what there is to keep."""
        return self._keeps and not self._layers

    def knows(self, slot: int) -> bool:
        """A displaced call may name this slot."""
        return slot in self._row_of

    def forget(self, slots: Sequence[int]) -> None:
        """Drop what is known of these slots, if anything is."""
        for slot in slots:
            row = self._row_of.pop(slot, None)
            if row is not None:
                self._free.append(row)

    def begin(self, slots: Sequence[int], *, synchronous: bool) -> None:
        """Start a call whose rows are of these slots.

        Raises:
            ValueError: a displaced call names a slot of which nothing is known.
        """
        self._synchronous = synchronous or not self._keeps
        for group in self._groups:
            group.packed = 0
        if not self._keeps:
            return
        strangers = [slot for slot in slots if slot not in self._row_of]
        if strangers and not synchronous:
            raise ValueError(f"slots: {strangers} are unknown here; allowed in a displaced call: {list(self._row_of)}")
        if synchronous:
            self.settle()
        if len(strangers) > len(self._free):
            self._grow(len(strangers) - len(self._free))
        for slot in strangers:
            self._row_of[slot] = self._free.pop()
        self._index(tuple(self._row_of[slot] for slot in slots))

    def swap(self, layer: int, fresh: torch.Tensor, *, own: bool, waited: bool) -> torch.Tensor:
        """Give this part's `fresh`, [R, ...], and take what all parts gave, [R, n, ...]: a tensor of the caller's own.

        Args:
            layer: any number that is the layer's own.
            own: this part's entry is what it gives now, also in a displaced call.
            waited: in a displaced call too, take what the others give now; nothing of it is kept.
        """
        if self._synchronous or waited:
            return self._swap_now(layer, fresh, kept=self._keeps and not waited)
        return self._swap_displaced(self._layers[layer], fresh, own)

    def finish(self) -> None:
        """End a call. A CUDA graph must end with nothing on its way."""
        if self._learned:
            self._lay_out()
        if self._team.stream is not None and torch.cuda.is_current_stream_capturing():
            self.settle()

    def settle(self) -> None:
        """Make the computation wait for all that is on its way."""
        for group in self._groups:
            self._arrive(group)

    def _swap_now(self, number: int, fresh: torch.Tensor, *, kept: bool) -> torch.Tensor:
        sent = _words(fresh)
        parts, rows = self.place.parts, len(fresh)
        gathered = sent.new_empty(parts, *sent.shape)
        dist.all_gather_into_tensor(gathered.view(-1), sent.view(-1), group=self._team.waited)
        every = gathered.transpose(0, 1)
        if kept:
            layer = self._layers.get(number)
            if layer is None:
                # A copy, because what is returned is the caller's, and a compiled caller writes over it.
                self._learned.append((number, fresh.dtype, fresh.shape[1:], every.clone()))
            else:
                part = layer.group.known[:, :, layer.offset : layer.offset + layer.words]
                _put(part, None if self._whole else self._rows, every)
        elements = math.prod(fresh.shape[1:])
        return every.view(fresh.dtype)[..., :elements].contiguous().view(rows, parts, *fresh.shape[1:])

    def _swap_displaced(self, layer: _Layer, fresh: torch.Tensor, own: bool) -> torch.Tensor:
        group = layer.group
        self._arrive(group)
        columns = slice(layer.offset, layer.offset + layer.words)
        rows, elements = len(fresh), math.prod(layer.shape)
        part = group.known[:, :, columns]
        # A copy in either case: what is on its way next is put over the original.
        known = part.clone(memory_format=torch.contiguous_format) if self._whole else part.index_select(0, self._rows)
        known = known.view(layer.dtype)[..., :elements].contiguous().view(rows, self.place.parts, *layer.shape)
        if own:
            known[:, self.place.part].copy_(fresh)
        if self._sends:
            group.sent[:rows, columns].view(layer.dtype)[:, :elements].copy_(fresh.reshape(rows, elements))
            group.packed += 1
            if group.packed == group.layers:
                self._send(group, rows)
        return known

    def _send(self, group: _Group, rows: int) -> None:
        """Send a group's words; nothing waits for them before `arrive`."""
        parts, sent, indices = self.place.parts, group.sent[:rows], None if self._whole else self._rows
        stream = self._team.stream
        if stream is None:
            gathered = sent.new_empty(parts, *sent.shape)
            arguments = (gathered.view(-1), sent.reshape(-1))
            work = dist.all_gather_into_tensor(*arguments, group=self._team.background, async_op=True)
            assert work is not None

            def arrive() -> None:
                work.wait()
                _put(group.known, indices, gathered.transpose(0, 1))

            group.arrive = arrive
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            gathered = self._gathered[: parts * sent.numel()].view(parts, *sent.shape)
            dist.all_gather_into_tensor(gathered.view(-1), sent.view(-1), group=self._team.background)
            _put(group.known, indices, gathered.transpose(0, 1))
            arrived = stream.record_event()
        group.arrive = lambda: torch.cuda.current_stream(self._device).wait_event(arrived)

    def _arrive(self, group: _Group) -> None:
        if group.arrive is not None:
            group.arrive()
            group.arrive = None

    def _lay_out(self) -> None:
        """Group the layers that a synchronous call has shown, and keep what they gave in it."""
        learned, self._learned = self._learned, []
        group = _Group()
        fresh: list[tuple[_Group, list[torch.Tensor]]] = []
        for number, dtype, shape, every in learned:
            if not group.layers or group.words >= self._group_words:
                group = _Group()
                fresh.append((group, []))
            words = every.shape[2]
            self._layers[number] = _Layer(group, group.words, words, dtype, tuple(shape))
            group.words += words
            group.layers += 1
            fresh[-1][1].append(every)
        for group, parts in fresh:
            group.known = torch.zeros(self._held, self.place.parts, group.words, dtype=torch.int64, device=self._device)
            group.known.index_copy_(0, self._rows, torch.cat(parts, dim=2))
            self._groups.append(group)
        self._make_room(len(self._rows))
        self._version = next(_numbers)

    @property
    def _held(self) -> int:
        return len(self._row_of) + len(self._free)

    def _grow(self, missing: int) -> None:
        """Hold at least so many rows more, and at least twice as many as now."""
        held = self._held
        more = max(missing, held)
        self.settle()
        for group in self._groups:
            group.known = torch.cat([group.known, group.known.new_zeros(more, *group.known.shape[1:])])
        self._free.extend(reversed(range(held, held + more)))
        self._version = next(_numbers)

    def _index(self, rows: tuple[int, ...]) -> None:
        """Point at the rows of this call. The tensor for each count stays where it is, for CUDA graphs."""
        before, index = self._indices.get(len(rows), ((), None))
        if index is None:
            index = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        if rows != before:
            self.settle()  # what is on its way is still to be put where the index says
            host = torch.tensor(rows)
            host = host.pin_memory() if self._device.type == "cuda" else host
            index.copy_(host, non_blocking=True)
        self._indices[len(rows)] = rows, index
        self._rows = index
        self._whole = rows == tuple(range(self._held))
        self._make_room(len(rows))

    def _make_room(self, rows: int) -> None:
        """Let every group send so many rows."""
        if self._groups and len(self._groups[-1].sent) < rows:
            self.settle()
            for group in self._groups:
                group.sent = torch.zeros(rows, group.words, dtype=torch.int64, device=self._device)
            most = max(group.words for group in self._groups)
            if self._team.stream is not None:
                self._gathered = torch.empty(self.place.parts * rows * most, dtype=torch.int64, device=self._device)
            self._version = next(_numbers)


def _put(known: torch.Tensor, rows: torch.Tensor | None, every: torch.Tensor) -> None:
    """Into these rows of what is known; None: into all. A plain copy takes a fraction of the time."""
    if rows is None:
        known.copy_(every)
    else:
        known.index_copy_(0, rows, every)


def _words(fresh: torch.Tensor) -> torch.Tensor:
    """[R, ...] of any dtype -> [R, P] int64, each row padded with zeros to whole aligned words."""
    flat = fresh.reshape(len(fresh), -1)
    unit = 8 * _ALIGNED_WORDS // flat.element_size()
    rest = -flat.shape[1] % unit
    if rest:
        flat = torch.nn.functional.pad(flat, (0, rest))
    return flat.contiguous().view(torch.int64)


class Link:
    """Ties the layers of one network to the exchange of the call at hand. Outside of calls the network runs whole.

    text: keys and values of the prompts, [R, L, 2C] for each cross-attention layer in turn; None: not computed yet.
    statistics: how GroupNorm takes those of the whole picture: corrected, stale, separate or synchronous.
    """

    def __init__(self, device: torch.device) -> None:
        self.parts = 1
        self.part = 0
        self.statistics = "corrected"
        self.text: list[torch.Tensor] | None = None
        self.number = next(_numbers)
        self.exchange: Exchange | None = None
        with torch.inference_mode(False):
            self._order = torch.zeros(1, device=device)
        _links[self.number] = self

    def connect(self, exchange: Exchange | None) -> None:
        """Run as one part of the exchange's until `disconnect`; None: whole, but with the cached text."""
        self.exchange = exchange
        self.part, self.parts = (exchange.place.part, exchange.place.parts) if exchange is not None else (0, 1)

    def disconnect(self) -> None:
        self.exchange, self.part, self.parts = None, 0, 1
        self.text = None

    def swap(self, layer: int, fresh: torch.Tensor, *, own: bool = False, waited: bool = False) -> torch.Tensor:
        """`Exchange.swap` of the call at hand; a compiled network calls it as one opaque operation."""
        if torch.compiler.is_compiling():
            every: torch.Tensor = torch.ops.headstart.patch_swap(
                fresh, self._order, self.number, layer, self.parts, own, waited
            )
            return every
        assert self.exchange is not None
        return self.exchange.swap(layer, fresh, own=own, waited=waited)


_links: WeakValueDictionary[int, Link] = WeakValueDictionary()


@torch.library.custom_op("headstart::patch_swap", mutates_args=("order",))
def _patch_swap(
    fresh: torch.Tensor, order: torch.Tensor, link: int, layer: int, parts: int, own: bool, waited: bool
) -> torch.Tensor:
    """`order` is not touched: that it is said to be keeps the compiler from reordering exchanges, rank by rank."""
    exchange = _links[link].exchange
    assert exchange is not None
    return exchange.swap(layer, fresh, own=own, waited=waited)


@_patch_swap.register_fake
def _(
    fresh: torch.Tensor, order: torch.Tensor, link: int, layer: int, parts: int, own: bool, waited: bool
) -> torch.Tensor:
    return fresh.new_empty(fresh.shape[0], parts, *fresh.shape[1:])
