"""A rank's part of one network call: what rank 0 and its followers do alike.

    rows of a tick --share--> teams --broadcast--> each team denoises its rows --gather--> rank 0

A team of one rank is a replica; a team of several splits each picture between its ranks (patch parallelism).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from accel.patch.mesh import Mesh, make_mesh
from models.diffusion.denoiser import TextDenoiser, to_device
from models.diffusion.loaded import LoadedModel
from models.diffusion.model import Condition
from models.diffusion.patch_denoiser import PatchCall, PatchDenoiser
from models.diffusion.patch_vae import DecodeCall, PatchDecoder
from service.diffusion.orders import Evaluate, Meet, Network, degrees_of, tensors_of


class BrokenError(Exception):
    """A rank failed within a split picture, so that others wait for what will not come."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def share(weights: Sequence[int], teams: int) -> tuple[tuple[int, ...], ...]:
    """Which rows each team runs: each row goes to the team with the least work so far; teams without any are left out.

    Args:
        weights: network rows of each row.
    """
    shares: list[list[int]] = [[] for _ in range(teams)]
    work = [0] * teams
    for row, weight in enumerate(weights):
        least = work.index(min(work))
        shares[least].append(row)
        work[least] += weight
    return tuple(tuple(rows) for rows in shares if rows)


def pack(x: torch.Tensor, t: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """[B, C * h * w + 2] float32: x, t and alpha of each row, side by side."""
    return torch.cat([x.flatten(1), t[:, None], alpha[:, None]], dim=1)


class Seat:
    """A rank's place in the group, and the collective calls that it takes part in.

    Args:
        model: loaded on this rank's device, the same on every rank.
        store: where the ranks meet; a new one for each group.
        leaders: a pipe from the leader of each team in which this rank follows, by the leader's rank.
        members: a pipe to each rank that follows this one in some team.
    """

    def __init__(
        self,
        model: LoadedModel,
        meet: Meet,
        store: Store,
        leaders: Mapping[int, Connection],
        members: Mapping[int, Connection],
    ) -> None:
        self._model = model
        self._rank, self._gpus, self._warm_up = meet.rank, meet.gpus, meet.warm_up
        self._leaders, self._members = leaders, members
        self._launch = meet.launch
        self._patches: dict[tuple[Network, int], PatchDenoiser] = {}
        self._decoders: dict[int, PatchDecoder] = {}
        self._listeners: list[Connection] = []  # the others of the team that this rank leads now
        self._told = False  # they are in a collective call
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(model.device)
            # Faults are for the watch over the followers to find: NCCL's own ways would end this process.
            os.environ |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=meet.rank,
            world_size=meet.gpus,
            timeout=datetime.timedelta(seconds=meet.timeout_s),
        )
        dist.all_reduce(torch.ones(1, device=model.device))  # connects all ranks while that is still part of the start
        self._meshes = self._meet_teams()

    def spread(self, conditions: Sequence[Condition]) -> None:
        """Broadcast the tensors of the conditions that followers learn; filled in place there."""
        for condition in conditions:
            for tensor in tensors_of(condition):
                dist.broadcast(tensor, 0)

    def evaluate(
        self, order: Evaluate, packed: torch.Tensor, conditions: Sequence[Condition]
    ) -> tuple[torch.Tensor | None, Exception | None]:
        """This rank's part of an order, whether it leads its team, follows in it, or has nothing to do.

        Args:
            packed: see `pack`; filled on rank 0, and by broadcast on others. Empty for those who follow where one team
                runs it all.
            conditions: of each row.

        Returns:
            The denoised rows of the team that this rank leads, [b, C, h, w] float32, else None; and what went wrong.
            Every rank goes on to `gather` either way.

        Raises:
            BrokenError: the group can do no more.
        """
        if not order.alone:
            dist.broadcast(packed, 0)
        team, place = divmod(self._rank, order.degree)
        if team >= len(order.shares) or not order.shares[team]:
            return None, None
        self._release(order, team)
        if place:
            self._model.use_loras(order.loras)
            self._follow(team * order.degree, lambda call: self._patch(order).follow(call))
            return None, None
        rows = list(order.shares[team])
        team_conditions = [conditions[row] for row in rows]
        try:
            self._model.use_loras(order.loras)
            mine = packed if order.alone else packed.index_select(0, self._index(rows))
            x = mine[:, :-2].reshape(len(rows), *order.shape)
            t, alpha = mine[:, -2], mine[:, -1]
            if order.degree > 1:
                return self._lead(order, rows, x, t, alpha, team_conditions), None
            return self._model.denoiser(*order.network)(x, t, alpha, team_conditions), None
        except BrokenError:
            raise
        except Exception as error:
            return None, error

    def gather(self, order: Evaluate, part: torch.Tensor | None) -> torch.Tensor | None:
        """Bring the teams' rows together: [B, C, h, w] float32 on rank 0, None on the others."""
        sent = torch.zeros(max(map(len, order.shares)), *order.shape, device=self._model.device)
        if part is not None:
            sent[: len(part)] = part
        if self._rank != 0:
            dist.gather(sent)
            return None
        received = [torch.empty_like(sent) for _ in range(self._gpus)]
        dist.gather(sent, received)
        parts = [received[team * order.degree][: len(rows)] for team, rows in enumerate(order.shares)]
        rows = self._index([row for rows in order.shares for row in rows])
        return sent.new_empty(order.rows, *order.shape).index_copy_(0, rows, torch.cat(parts))

    def decode(self, degree: int, latents: torch.Tensor) -> tuple[torch.Tensor | None, Exception | None]:
        """[B, C, h, w] float32 latents to [B, H, W, 3] uint8 pictures on rank 0, by the first `degree` ranks.

        Called on these; followers' latents are not read. Returns and raises as `evaluate`.
        """
        if self._rank != 0:
            self._follow(0, lambda call: self._decoder(degree).follow(call))
            return None, None
        try:
            with self._leading(degree):
                return self._decoder(degree)(latents), None
        except BrokenError:
            raise
        except Exception as error:
            return None, error

    def _lead(
        self,
        order: Evaluate,
        rows: Sequence[int],
        x: torch.Tensor,
        t: torch.Tensor,
        alpha: torch.Tensor,
        conditions: Sequence[Condition],
    ) -> torch.Tensor:
        slots, ran = [order.slots[row] for row in rows], [order.ran[row] for row in rows]
        with self._leading(order.degree):
            return self._patch(order)(x, t, alpha, conditions, slots=slots, ran=ran)

    @contextmanager
    def _leading(self, degree: int) -> Iterator[None]:
        """Around collective calls of the team that this rank leads; the others of it are in `_follow`."""
        self._listeners = [self._members[self._rank + place] for place in range(1, degree)]
        self._told = False
        try:
            yield
        except Exception as error:
            if self._told:
                raise BrokenError(error) from error
            raise
        finally:
            for listener in self._listeners:
                listener.send(None)

    def _tell(self, call: PatchCall | DecodeCall) -> None:
        self._told = True
        for listener in self._listeners:
            listener.send(call)

    def _follow(self, leader: int, act: Callable[[Any], None]) -> None:
        try:
            while (call := self._leaders[leader].recv()) is not None:
                act(call)
        except Exception as error:
            raise BrokenError(error) from error

    def _index(self, rows: Sequence[int]) -> torch.Tensor:
        return to_device(torch.tensor(rows), self._model.device)

    def _decoder(self, degree: int) -> PatchDecoder:
        if degree not in self._decoders:
            mesh = self._meshes[degree]
            self._decoders[degree] = PatchDecoder(self._model.decoder, mesh, self._tell if mesh.leads else None)
        return self._decoders[degree]

    def _patch(self, order: Evaluate) -> PatchDenoiser:
        """The split form of the order's denoiser, made when it is first called for."""
        key = (order.network, order.degree)
        if key not in self._patches:
            mesh = self._meshes[order.degree]
            denoiser = self._model.denoiser(*order.network)
            assert isinstance(denoiser, TextDenoiser)  # no other has a plan, so none is asked for
            tell = self._tell if mesh.leads else None
            self._patches[key] = PatchDenoiser(denoiser, mesh, tell, warm_up=self._warm_up, launch=self._launch)
        return self._patches[key]

    def _release(self, order: Evaluate, team: int) -> None:
        """Forget what was kept for pictures of the team that have ended; its leader tells the others."""
        slots = [slot for of_team, slot in order.released if of_team == team]
        for (_, degree), patch in self._patches.items():
            if degree == order.degree and self._meshes[degree].leads:
                patch.release(order.shape, slots)

    def _meet_teams(self) -> dict[int, Mesh]:
        """The team that this rank is in, by degree. All ranks make all teams, in one order."""
        meshes = {}
        for degree in degrees_of(self._gpus):
            for first in range(0, self._gpus - degree + 1, degree):
                mesh = make_mesh(tuple(range(first, first + degree)), device=self._model.device)
                if mesh is not None:
                    meshes[degree] = mesh
        return meshes
