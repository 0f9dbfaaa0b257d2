"""Who computes what: which rows of a picture, and which of its two guidance branches.

A mesh is the ranks that draw one picture together. They can be arranged in two ways: all of them share out the rows,
or, where a picture has two guidance branches and the degree is even, each half of them the rows of one branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, cast

import torch
import torch.distributed as dist


class Place(NamedTuple):
    """One rank's share: part `part` of `parts` equal bands of rows; of branch 0 (positive), 1 (negative), or both."""

    part: int
    parts: int
    branch: int | None

    def rows(self, height: int) -> slice:
        """This part's rows of a picture; `height` is a multiple of `parts`."""
        band = height // self.parts
        return slice(self.part * band, (self.part + 1) * band)


def places(degree: int, *, split: bool) -> list[Place]:
    """The share of each of `degree` ranks. `split`: guidance branches go to halves of the ranks.

    Raises:
        ValueError: the degree is below 1, or odd where it is to be split.
    """
    if degree < 1 or (split and degree % 2):
        allowed = "even and at least 2" if split else "at least 1"
        raise ValueError(f"degree: {degree}; allowed: {allowed}")
    if not split:
        return [Place(rank, degree, None) for rank in range(degree)]
    parts = degree // 2
    return [Place(rank % parts, parts, rank // parts) for rank in range(degree)]


@dataclass(frozen=True, slots=True, eq=False)
class Team:
    """The ranks that share the rows of the same evaluations, and their ways to exchange.

    A communicator serves one stream: `waited` that of the computation, `background` the team's own.
    """

    place: Place
    waited: dist.ProcessGroup
    background: dist.ProcessGroup
    stream: torch.cuda.Stream | None  # None: the background is gloo's threads


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """The ranks of one picture. The first leads: it owns the latents.

    world: all of them, on the stream of the computation.
    rows: all of them share out rows. branches: half of them do, each half for one guidance branch; None: odd degree.
    """

    ranks: tuple[int, ...]  # global
    rank: int  # this process's index among them
    device: torch.device
    world: dist.ProcessGroup
    rows: Team
    branches: Team | None

    @property
    def degree(self) -> int:
        return len(self.ranks)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The leader's values, in place."""
        dist.broadcast(values, self.ranks[0], group=self.world)
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[...] of each rank -> [degree, ...] on every rank."""
        values = values.contiguous()
        gathered = values.new_empty(self.degree, *values.shape)
        dist.all_gather_into_tensor(gathered.view(-1), values.view(-1), group=self.world)
        return gathered

    def close(self) -> None:
        """Destroy its process groups."""
        teams = [self.rows] if self.branches is None else [self.rows, self.branches]
        groups = dict.fromkeys([self.world, *(group for team in teams for group in (team.waited, team.background))])
        for group in groups:
            dist.destroy_process_group(group)


def make_mesh(ranks: Sequence[int], *, device: torch.device, timeout: timedelta | None = None) -> Mesh | None:
    """A mesh of global ranks, the leader first. Every process of the world must call it, in the same order of meshes.

    Its communicators are connected here, because that cannot happen while a CUDA graph is captured.

    Returns:
        None on a process that is not among them.

    Raises:
        ValueError: a rank is named twice or is not there.
    """
    world, me = dist.get_world_size(), dist.get_rank()
    if not ranks or len(set(ranks)) < len(ranks) or not all(0 <= rank < world for rank in ranks):
        raise ValueError(f"ranks: {list(ranks)}; allowed: different ones from 0 to {world - 1}")
    if list(ranks) != sorted(ranks):
        raise ValueError(f"ranks: {list(ranks)}; allowed: in ascending order")
    everyone = _group(ranks, timeout)
    behind = _group(ranks, timeout)
    half = len(ranks) // 2
    halves = [ranks[:half], ranks[half:]] if len(ranks) % 2 == 0 else []
    waited = [_group(part, timeout) for part in halves]
    background = [_group(part, timeout) for part in halves]
    if me not in ranks:
        return None
    rank = ranks.index(me)
    rows = Team(places(len(ranks), split=False)[rank], everyone, behind, _stream(device))
    groups, branches = [everyone, behind], None
    if halves:
        place = places(len(ranks), split=True)[rank]
        assert place.branch is not None
        branches = Team(place, waited[place.branch], background[place.branch], _stream(device))
        groups += [branches.waited, branches.background]
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    return Mesh(tuple(ranks), rank, device, everyone, rows, branches)


def _group(ranks: Sequence[int], timeout: timedelta | None) -> dist.ProcessGroup:
    """On a rank that is not among them it is a placeholder, which must not be used."""
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), timeout=timeout))


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """Its few blocks go first wherever the computation leaves room, or they would wait for whole kernels to end."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
