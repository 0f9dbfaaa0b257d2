"""A text denoiser whose UNet runs on several ranks, each on its rows of the picture.

The leader is called like any `Denoiser`. Each of its network calls is collective: it tells the followers a `PatchCall`,
and they follow it. In this order there go through torch.distributed, on the mesh's own groups, from the leader

    the text states of conditions that are new to the followers    one broadcast, flattened, in the network's dtype
    x, t, alpha                                                     one broadcast, flattened, in float32

then what the UNet's layers exchange, and an all-gather of the output's rows. Followers keep text states by the numbers
under which calls name conditions. A call that fails after it was told leaves the mesh broken: its ranks no longer make
the same collective calls, and it must be made anew.

The first rows that a picture runs are synchronous, so that its later ones have a step before them to look back at. Rows
in warm-up and displaced rows of one batch run as two calls, and so do rows with and without a negative branch, where
the mesh can share out branches.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from accel.patch.attention import project_text
from accel.patch.exchange import MODES, Exchange
from accel.patch.mesh import Mesh, Team
from models.diffusion.denoiser import CACHED_BATCHES, TextDenoiser, to_device
from models.diffusion.model import Condition, TextStates
from models.diffusion.patch import cross_attentions, install, patch_plan
from models.diffusion.patch_launch import Launcher

WARM_UP = 4
KNOWN_CONDITIONS = 128  # at least; followers keep text states of so many, 1 MB each in SDXL
STATISTICS = {"stale_gn": "stale", "separate_gn": "separate", "sync_gn": "synchronous"}  # by mode; else corrected

Shape = tuple[int, ...]
Loras = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Learned:
    """A condition that followers do not know yet; its text states are broadcast in the order of `texts`.

    texts: (shape of the hidden states, of the pooled state) of the positive and, if there is one, the negative prompt.
    """

    number: int
    guidance_scale: float
    time_ids: tuple[float, ...] | None
    texts: tuple[tuple[Shape, Shape | None], ...]


@dataclass(frozen=True, slots=True)
class PatchCall:
    """One network call, as its followers are told of it. Plain values only.

    shape: (B, C, h, w) of the latents. slots, conditions: one for each of the B rows.
    split: guidance branches go to halves of the ranks. synchronous: rows are in warm-up.
    forgotten: (C, h, w) and slots of pictures that have ended. learned, dropped: see Learned; numbers to forget.
    """

    shape: tuple[int, int, int, int]
    slots: tuple[int, ...]
    conditions: tuple[int, ...]
    split: bool
    synchronous: bool
    forgotten: tuple[tuple[Shape, tuple[int, ...]], ...]
    learned: tuple[Learned, ...]
    dropped: tuple[int, ...]


class PatchDenoiser:
    """Implements `Denoiser` on the mesh's leader; on the other ranks it follows.

    Args:
        denoiser: it stays usable, with the same weights, for pictures that are drawn by one rank.
        tell: sends a call to every follower; None on followers.
        warm_up: rows at a picture's start that run synchronously, at least 1.
        mode: one of accel.patch.exchange.MODES.
        launch: one of LAUNCHES.
        split_guidance: share out guidance branches where there are two and the degree is even.

    Raises:
        PatchError: the denoiser has no patch plan.
    """

    def __init__(
        self,
        denoiser: TextDenoiser,
        mesh: Mesh,
        tell: Callable[[PatchCall], None] | None,
        *,
        warm_up: int = WARM_UP,
        mode: str = "displaced",
        launch: str = "eager",
        split_guidance: bool = True,
    ) -> None:
        if warm_up < 1:
            raise ValueError(f"warm_up: {warm_up}; allowed: at least 1")
        if mode not in MODES:
            raise ValueError(f"mode: {mode!r}; allowed: {', '.join(MODES)}")
        self.plan = patch_plan(denoiser)
        self._mesh = mesh
        self._tell = tell
        self._warm_up = warm_up
        self._splits = split_guidance and mesh.branches is not None
        self._network = _Network(denoiser.network, mesh, mode, launch)
        self._denoiser = denoiser.on(self._network)
        self._numbers: OrderedDict[int, int] = OrderedDict()  # the leader's: by id of a condition
        self._conditions: dict[int, Condition] = {}  # by number
        self._next_number = 0
        self._forgotten: list[tuple[Shape, tuple[int, ...]]] = []

    @torch.inference_mode()
    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        alpha: torch.Tensor,
        conditions: Sequence[Condition],
        *,
        slots: Sequence[int] | None = None,
        ran: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Estimate x0, as `Denoiser` says; on the leader.

        Args:
            slots: the latent slot of each row; it tells pictures of one latent shape apart.
            ran: rows that each picture has run since it began, at a plan's row 0 or K. Below the warm-up, or of a slot
                of which nothing is known, a row runs synchronously. Without `slots` and `ran` all do.

        Raises:
            PatchError: the picture's rows cannot be shared out. Nothing has been told then.
        """
        assert self._tell is not None, "followers follow"
        rows = x.shape[2]
        for guided in {self._split(condition) for condition in conditions}:
            self.plan.check(self._mesh.degree, rows, guided=guided)
        slots = range(len(x)) if slots is None else slots
        ran = [0] * len(x) if ran is None else ran
        self._forget(tuple(x.shape[1:]), [slot for slot, count in zip(slots, ran, strict=True) if count == 0])
        parts = self._divide(tuple(x.shape[1:]), slots, ran, conditions)
        if len(parts) == 1:
            return self._run(parts[0][1], x, t, alpha, conditions, slots)
        denoised = torch.empty_like(x)
        for mine, kind in parts:
            index = to_device(torch.tensor(mine), x.device)
            some = [conditions[row] for row in mine]
            part = self._run(kind, x[index], t[index], alpha[index], some, [slots[row] for row in mine])
            denoised.index_copy_(0, index, part)
        return denoised

    def release(self, shape: Shape, slots: Sequence[int]) -> None:
        """Pictures of latents (C, h, w) have ended: what is kept for them is dropped with the next call."""
        self._forget(tuple(shape), slots)

    @torch.inference_mode()
    def follow(self, call: PatchCall) -> None:
        """Take part in a call of the leader's."""
        self._learn(call)
        size = math.prod(call.shape)
        count = call.shape[0]
        values = torch.empty(size + 2 * count, device=self._mesh.device)
        x, t, alpha = self._mesh.broadcast(values).split([size, count, count])
        conditions = [self._conditions[number] for number in call.conditions]
        self._network.prepare(call, conditions)
        self._denoiser(x.view(call.shape), t, alpha, conditions)

    @property
    def row_bytes(self) -> int:
        """What a row of a displaced call sends to each other rank of its team, over all shapes in use."""
        return sum(exchange.row_bytes for exchange in self._network.exchanges.values())

    def _forget(self, shape: Shape, slots: Sequence[int]) -> None:
        if slots:
            self._forgotten.append((shape, tuple(slots)))
            self._network.forget(self._forgotten[-1:])

    def _split(self, condition: Condition) -> bool:
        return self._splits and condition.negative is not None

    def _divide(
        self, shape: Shape, slots: Sequence[int], ran: Sequence[int], conditions: Sequence[Condition]
    ) -> list[tuple[list[int], tuple[bool, bool]]]:
        """Rows by (split, synchronous)."""
        parts: dict[tuple[bool, bool], list[int]] = {}
        for row, (slot, count, condition) in enumerate(zip(slots, ran, conditions, strict=True)):
            split = self._split(condition)
            warm = self._network.displaces(split=split) and (
                count < self._warm_up or not self._network.knows(shape, slot, split=split)
            )
            parts.setdefault((split, warm), []).append(row)
        return [(rows, kind) for kind, rows in parts.items()]

    def _run(
        self,
        kind: tuple[bool, bool],
        x: torch.Tensor,
        t: torch.Tensor,
        alpha: torch.Tensor,
        conditions: Sequence[Condition],
        slots: Sequence[int],
    ) -> torch.Tensor:
        assert self._tell is not None
        numbers, learned, dropped = self._number(conditions)
        forgotten, self._forgotten = tuple(self._forgotten), []
        batch, channels, height, width = x.shape
        call = PatchCall((batch, channels, height, width), tuple(slots), numbers, *kind, forgotten, learned, dropped)
        self._tell(call)
        self._learn(call)
        self._mesh.broadcast(torch.cat([x.flatten(), t, alpha]))
        self._network.prepare(call, conditions)
        return self._denoiser(x, t, alpha, conditions)

    def _number(self, conditions: Sequence[Condition]) -> tuple[tuple[int, ...], tuple[Learned, ...], tuple[int, ...]]:
        """(the conditions' numbers, those that are new, numbers that are given up)."""
        learned, dropped = [], []
        for condition in conditions:
            if id(condition) not in self._numbers:
                self._numbers[id(condition)] = self._next_number
                self._conditions[self._next_number] = condition  # held, so that its id stays taken
                texts = [_shapes(states) for states in _texts(condition)]
                learned.append(Learned(self._next_number, condition.guidance_scale, condition.time_ids, tuple(texts)))
                self._next_number += 1
            self._numbers.move_to_end(id(condition))
        while len(self._numbers) > max(KNOWN_CONDITIONS, len(conditions)):
            _, number = self._numbers.popitem(last=False)
            dropped.append(number)
        return tuple(self._numbers[id(condition)] for condition in conditions), tuple(learned), tuple(dropped)

    def _learn(self, call: PatchCall) -> None:
        """Take over a call's news: on every rank, the leader included."""
        self._network.forget(call.forgotten)
        for number in call.dropped:
            del self._conditions[number]
        if not call.learned:
            return
        shapes = [shape for new in call.learned for text in new.texts for shape in text if shape is not None]
        if self._mesh.leads:
            texts = [states for new in call.learned for states in _texts(self._conditions[new.number])]
            tensors = [tensor for states in texts for tensor in (states.hidden, states.pooled) if tensor is not None]
            self._mesh.broadcast(torch.cat([tensor.flatten().to(self._network.dtype) for tensor in tensors]))
            return
        values = torch.empty(sum(map(math.prod, shapes)), dtype=self._network.dtype, device=self._mesh.device)
        received = self._mesh.broadcast(values).split([math.prod(shape) for shape in shapes])
        tensors_left = iter(part.view(shape) for part, shape in zip(received, shapes, strict=True))
        for new in call.learned:
            states = [TextStates(next(tensors_left), next(tensors_left) if pooled else None) for _, pooled in new.texts]
            negative = states[1] if len(states) > 1 else None
            self._conditions[new.number] = Condition(states[0], negative, new.guidance_scale, new.time_ids)


class _Share(NamedTuple):
    """A rank's share of a batch's conditioning."""

    states: torch.Tensor  # held so that the identity this share is found by stays taken
    arguments: dict[str, Any]  # of the network
    text: list[torch.Tensor]  # keys and values of each cross-attention layer, [R, L, 2C]


class _Network:
    """In a denoiser's UNet's place: runs the call at hand on this rank's share, and gathers the whole output."""

    def __init__(self, unet: Any, mesh: Mesh, mode: str, launch: str) -> None:
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self._mesh = mesh
        self._mode = mode
        self._link = install(unet, unet.device, entry="conv_in")
        self._crossing = cross_attentions(unet)
        layers = [module for module in unet.modules() if hasattr(module, "lora_A")]
        self._lora_layers = {name: layer for layer in layers for name in layer.lora_A}  # one for each name
        self._launcher = Launcher(unet, launch, mesh.device)
        self.exchanges: dict[tuple[bool, Shape, Loras], Exchange] = {}  # by split and (C, h, w)
        self._shares: OrderedDict[tuple[Any, ...], _Share] = OrderedDict()
        self._call: PatchCall | None = None
        self._slots: list[int] = []

    def displaces(self, *, split: bool) -> bool:
        """Displaced calls differ from synchronous ones."""
        return self._mode != "full_sync" and self._team(split).place.parts > 1

    def knows(self, shape: Shape, slot: int, *, split: bool) -> bool:
        exchange = self.exchanges.get((split, shape, self._loras()))
        return exchange is not None and exchange.knows(2 * slot)

    def forget(self, forgotten: Sequence[tuple[Shape, Sequence[int]]]) -> None:
        for shape, slots in forgotten:
            for (_, other, _), exchange in self.exchanges.items():
                if other == shape:
                    exchange.forget([2 * slot + branch for slot in slots for branch in (0, 1)])

    def prepare(self, call: PatchCall, conditions: Sequence[Condition]) -> None:
        """The call that comes next. Each branch of a picture has a slot of its own in the exchange."""
        guided = [
            slot for slot, condition in zip(call.slots, conditions, strict=True) if condition.negative is not None
        ]
        self._call = call
        self._slots = [2 * slot for slot in call.slots] + [2 * slot + 1 for slot in guided]

    def __call__(
        self, sample: torch.Tensor, t: torch.Tensor, *, return_dict: bool, **arguments: Any
    ) -> tuple[torch.Tensor]:
        """[R, C, H, w] -> ([R, C, H, w],) on every rank; the rows are all positives, then all negatives."""
        call = self._call
        assert call is not None
        assert not return_dict
        place = self._team(call.split).place
        half = len(sample) // 2
        band = slice(None) if place.branch is None else slice(place.branch * half, (place.branch + 1) * half)
        share = self._share(band, arguments)
        exchange = self._exchange(call) if place.parts > 1 else None
        key: Hashable = call.split, self._loras()
        if exchange is not None:
            exchange.begin(self._slots[band], synchronous=call.synchronous)
            key = None if exchange.learns else exchange.state
        self._link.statistics = STATISTICS.get(self._mode, "corrected")
        self._link.connect(exchange)
        try:
            local = self._launcher(
                key,
                self._forward,
                exchange.settle if exchange is not None else _nothing,
                *(sample[band], t[band], share.arguments, share.text),
            )
        finally:
            self._link.disconnect()
        every = self._mesh.gather(local)  # [degree, R', C, h, w]
        whole = every.unflatten(0, (-1, place.parts)).permute(0, 2, 3, 1, 4, 5)  # [branches, R', C, n, h, w]
        return (whole.reshape(sample.shape),)

    def _forward(
        self, sample: torch.Tensor, t: torch.Tensor, arguments: dict[str, Any], text: list[torch.Tensor]
    ) -> torch.Tensor:
        self._link.text = text
        output: torch.Tensor = self._launcher.network(sample, t, return_dict=False, **arguments)[0]
        if self._link.exchange is not None:
            self._link.exchange.finish()
        return output

    def _team(self, split: bool) -> Team:
        if not split:
            return self._mesh.rows
        assert self._mesh.branches is not None
        return self._mesh.branches

    def _exchange(self, call: PatchCall) -> Exchange:
        """The exchange of the call's shape, team and LoRA set, which decides which layers run."""
        key = (call.split, call.shape[1:], self._loras())
        if key not in self.exchanges:
            for other in [other for other, exchange in self.exchanges.items() if not len(exchange)]:
                self.exchanges.pop(other).settle()
            self.exchanges[key] = Exchange(self._team(call.split), self._mesh.device, self._mode)
        return self.exchanges[key]

    def _share(self, band: slice, arguments: dict[str, Any]) -> _Share:
        states = arguments["encoder_hidden_states"]
        key = (id(states), band.start, self._loras())
        if key not in self._shares:
            mine = tree_map(lambda tensor: tensor[band], arguments)
            text = [project_text(layer, mine["encoder_hidden_states"]) for layer in self._crossing]
            self._shares[key] = _Share(states, mine, text)
            if len(self._shares) > CACHED_BATCHES:
                self._shares.popitem(last=False)
        return self._shares[key]

    def _loras(self) -> Loras:
        """Those that are active, and the scale of each in one of its layers."""
        return tuple(
            (name, float(layer.scaling[name]))
            for name, layer in self._lora_layers.items()
            if name in layer.active_adapters and not layer.disable_adapters
        )


def _nothing() -> None:
    pass


def _texts(condition: Condition) -> list[TextStates]:
    return [states for states in (condition.positive, condition.negative) if states is not None]


def _shapes(states: TextStates) -> tuple[Shape, Shape | None]:
    return tuple(states.hidden.shape), None if states.pooled is None else tuple(states.pooled.shape)
