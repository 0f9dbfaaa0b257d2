"""Several GPUs as rank 0 sees them: network calls that other ranks take part in, and a group that can be started anew.

Rank 0 is the service's own process. It schedules and owns latents, text and cache; its followers (`crew.py`) hold the
same networks and nothing else of a request but the conditions that rank 0 holds too. A network call is told to them
through pipes and runs in collective calls (`shares.py`), whole rows on each rank or one picture on several.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from models.diffusion.dtype import resolve_device
from models.diffusion.loaded import LoadedModel
from models.diffusion.model import Condition
from models.diffusion.patch import patch_plan
from models.errors import PatchError
from service.config import ModelSettings, RankSettings, Settings
from service.diffusion.crew import Crew, prepare
from service.diffusion.degrees import Degrees, fitting
from service.diffusion.orders import Answer, Decode, Evaluate, Lesson, Load, Loras, Meet, Network, Shape, lesson
from service.diffusion.scheduler import Slots
from service.diffusion.shares import BrokenError, Seat, pack, share
from service.errors import HeadstartError, OutOfMemoryError, SetupError, UnavailableError
from service.faults import explained

log = logging.getLogger(__name__)

SETTLE_S = 5.0  # for steps that were on their way when memory ran out
START_S = 300.0  # for ranks to find each other
MEASURE_S = 20.0  # for all sizes, of which the next takes up to 16 times as long as the one before
COMPILED = ("compile", "graph")  # of the ways to run a shared network
COMPILING = 10  # times as long may a step take in which it is compiled
PROBE_SLOT = -1  # of the pictures that are measured with


class Places:
    """Latent slots that tell the ranks which of them are given back; see `service.diffusion.scheduler.Slots`."""

    def __init__(self, slots: Slots, ranks: Ranks) -> None:
        self._slots = slots
        self._ranks = ranks

    @property
    def free(self) -> int:
        return self._slots.free

    def acquire(self, shape: Shape) -> int:
        return self._slots.acquire(shape)

    def release(self, shape: Shape, slot: int) -> None:
        self._slots.release(shape, slot)
        self._ranks.release(shape, slot)


class Ranks:
    """The group of ranks that this process leads.

    `lost` says why the group cannot be used any more, from any thread; then `restart` makes another.

    Args:
        model: as it was loaded from `chosen`, on the first of `devices_of(chosen.device, settings.gpus)`.

    Raises:
        SetupError: a rank cannot load the model or join, or networks cannot be run as `settings.patch_launch` says.
    """

    def __init__(self, model: LoadedModel, chosen: ModelSettings, settings: RankSettings) -> None:
        self.gpus = settings.gpus
        self.restarts = 0
        self.held = 0  # the most conditions that a follower held at the last call of all ranks
        self.on_lost: Callable[[], None] = lambda: None  # called from any thread
        self._model = model
        self._chosen = replace(chosen, revision=model.card.revision, dtype=str(model.dtype).removeprefix("torch."))
        self._settings = settings
        self._launch = launch_of(settings.patch_launch, model.device)
        self._step_s = settings.timeout_s * (COMPILING if self._launch in COMPILED else 1)
        self._devices = devices_of(str(model.device), settings.gpus)
        self._all_threads = torch.get_num_threads()
        self._threads = max(1, self._all_threads // settings.gpus) if self._devices[0] == "cpu" else self._all_threads
        torch.set_num_threads(self._threads)
        self._before: torch.cuda.Event | None = None  # when the last call was made
        self._start()

    @property
    def lost(self) -> UnavailableError | None:
        return self._crew.lost

    @property
    def intact(self) -> bool:
        """The group was lost for want of memory, after all that ran before was done."""
        return self._intact

    @property
    def pids(self) -> list[int]:
        """Of the followers' processes, in order of rank."""
        return self._crew.pids

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Around work that may wait for other ranks: if that takes too long, the group is lost."""
        return self._crew.watched()

    def release(self, shape: Shape, slot: int) -> None:
        """A picture has given back its slot."""
        team = self._teams.pop((shape, slot), None)
        if team is not None:
            self._released.setdefault((shape, *team), []).append(slot)

    @torch.inference_mode()
    def evaluate(
        self,
        network: Network,
        loras: Loras,
        degree: int,
        x: torch.Tensor,
        t: torch.Tensor,
        alpha: torch.Tensor,
        conditions: Sequence[Condition],
        slots: Sequence[int],
        ran: Sequence[int],
    ) -> torch.Tensor:
        """A network call, as `models.diffusion.model.Denoiser`, by as many ranks as are of use.

        Args:
            network: names the denoiser, by a sampler and LoRAs with which it is the model's.
            loras: those that act.
            degree: ranks that share each picture.
            slots: the latent slot of each row.
            ran: how many rows each row's picture has run since it began.

        Raises:
            OutOfMemoryError: on this rank or another.
            UnavailableError: the group is lost.
            HeadstartError: the call failed on another rank; what failed on this one is raised as it is.
        """
        if self.lost is not None:
            raise self.lost
        shape: Shape = (x.shape[1], x.shape[2], x.shape[3])
        shares = self._shares(degree, shape, slots, [condition.evaluations for condition in conditions])
        order = Evaluate(network, loras, shape, degree, shares)
        if degree > 1:
            active = [team for team, rows in enumerate(shares) if rows]
            released = [(team, slot) for team in active for slot in self._released.pop((shape, degree, team), ())]
            order = order._replace(slots=tuple(slots), ran=tuple(ran), released=tuple(released))
        elif order.alone:
            denoised: torch.Tensor = self._model.denoiser(*network)(x, t, alpha, conditions)
            return denoised
        learned: list[Condition] = []
        if not order.alone:
            order, learned = self._teach(order, conditions)
        self._mark()
        return self._call(order, pack(x, t, alpha), conditions, learned)

    @torch.inference_mode()
    def decode(self, degree: int, latents: torch.Tensor) -> torch.Tensor:
        """`DiffusionModel.decode` on several ranks, of latents whose rows they can share. Raises as `evaluate`."""
        if self.lost is not None:
            raise self.lost
        self._mark()
        ranks = range(1, degree)
        self._crew.tell(dict.fromkeys(ranks, Decode(degree)))
        with self._together():
            pixels, error = self._seat.decode(degree, latents)
            answers = self._crew.answers(ranks)
        return self._result(pixels, error, answers)

    def measure(self, sizes: Iterable[tuple[int, int]]) -> dict[int, dict[int, float]]:
        """Seconds of a step of one picture, by latent cells and then by degree.

        Args:
            sizes: (width, height) in pixels, ascending; of those after the first as many as MEASURE_S and the memory
                allow.
        """
        card = self._model.card
        defaults = card.samplers[card.default_sampler]
        try:
            plan = patch_plan(self._model.denoiser(card.default_sampler))
        except PatchError:
            return {}
        begun = time.monotonic()
        seconds: dict[int, dict[int, float]] = {}
        for width, height in sizes:
            if 16 * (time.monotonic() - begun) > MEASURE_S:
                break
            self._model.use_loras(())
            with torch.inference_mode():
                size = (width, height)
                (condition,) = self._model.encode([("", "")], [defaults.guidance_scale], card.default_sampler, size)
            rows, columns = height // card.scale, width // card.scale
            x = torch.randn(1, card.latent_channels, rows, columns).to(self._model.device)
            degrees = fitting(plan, self.gpus, rows, guided=condition.negative is not None)
            try:
                seconds[rows * columns] = {degree: self._seconds(degree, x, condition) for degree in degrees}
            except Exception as error:
                if not isinstance(explained(error, "measuring a step"), OutOfMemoryError):
                    raise
                if self.lost is not None:
                    self.restart()
                break
        for cells, row in seconds.items():
            shown = ", ".join(f"{degree}: {1e3 * each:.1f} ms" for degree, each in row.items())
            log.info("a step of a picture of %d latent cells by patch degree: %s", cells, shown)
        return seconds

    def restart(self) -> None:
        """End what is left of the group and start another. Raises SetupError; then the group is still lost."""
        self._leave()
        self.restarts += 1
        self._start()
        log.info("the group of %d ranks has been started anew", self.gpus)

    def close(self) -> None:
        """End the followers."""
        self._leave()
        torch.set_num_threads(self._all_threads)

    def _start(self) -> None:
        self._numbers: dict[int, tuple[int, weakref.ref[Condition]]] = {}  # by id: what followers call a condition
        self._forgotten: list[int] = []
        self._next_number = itertools.count()
        self._teams: dict[tuple[Shape, int], tuple[int, int]] = {}  # (degree, team) of the pictures that ranks share
        self._released: dict[tuple[Shape, int, int], list[int]] = {}  # slots that teams have not been told of
        self._intact = False
        self._before = torch.cuda.Event() if self._model.device.type == "cuda" else None
        crew = self._crew = Crew(
            self.gpus,
            self._model.device.type == "cuda",
            self._settings.timeout_s,
            self._step_s,
            settle=self._settle,
            abort=self._abort,
            on_lost=lambda: self.on_lost(),
        )
        ranks = range(1, self.gpus)
        try:
            crew.tell({rank: Load(replace(self._chosen, device=self._devices[rank]), self._threads) for rank in ranks})
            _check(crew.answers(ranks))
            timeout = timedelta(seconds=START_S)
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
            meets = {
                rank: Meet(rank, self.gpus, store.port, self._step_s, self._settings.patch_warm_up, self._launch)
                for rank in range(self.gpus)
            }
            crew.tell({rank: meets[rank] for rank in ranks})
            self._seat = Seat(self._model, meets[0], store, {}, crew.pipes)
            _check(crew.answers(ranks))
        except Exception as error:
            reason = error.message if isinstance(error, HeadstartError) else f"{type(error).__name__}: {error}"
            crew.failed(reason)
            self._leave()
            raise SetupError(f"ranks.gpus: the {self.gpus} ranks cannot be started: {reason}") from error

    def _mark(self) -> None:
        """All that the device has been given so far is before the call that comes."""
        if self._before is not None:
            self._before.record(torch.cuda.current_stream(self._model.device))

    def _shares(
        self, degree: int, shape: Shape, slots: Sequence[int], weights: Sequence[int]
    ) -> tuple[tuple[int, ...], ...]:
        """The rows of each team. What a team keeps of a picture makes it stay with the team."""
        teams = self.gpus // degree
        if degree == 1:
            return share(weights, teams)
        shares: list[list[int]] = [[] for _ in range(teams)]
        load = [0] * teams
        for its_degree, team in self._teams.values():
            if its_degree == degree:
                load[team] += 1
        for row, slot in enumerate(slots):
            if (shape, slot) not in self._teams:
                team = load.index(min(load))
                load[team] += 1
                self._teams[shape, slot] = degree, team
            shares[self._teams[shape, slot][1]].append(row)
        used = max(team for team in range(teams) if shares[team]) + 1
        return tuple(map(tuple, shares[:used]))

    def _teach(self, order: Evaluate, conditions: Sequence[Condition]) -> tuple[Evaluate, list[Condition]]:
        """The order with its rows' conditions by number, and those of them that the followers are to learn."""
        numbers: list[int] = []
        lessons: list[Lesson] = []
        learned: list[Condition] = []
        for condition in conditions:
            if id(condition) not in self._numbers:
                number = next(self._next_number)
                self._numbers[id(condition)] = number, self._watch(condition, number)
                lessons.append(lesson(number, condition))
                learned.append(condition)
            numbers.append(self._numbers[id(condition)][0])
        forget = tuple(self._forgotten)
        del self._forgotten[: len(forget)]
        return order._replace(conditions=tuple(numbers), lessons=tuple(lessons), forget=forget), learned

    def _watch(self, condition: Condition, number: int) -> weakref.ref[Condition]:
        """Tells followers to forget the condition when this process has."""
        key, numbers, forgotten = id(condition), self._numbers, self._forgotten

        def forget(_: object) -> None:
            del numbers[key]
            forgotten.append(number)

        return weakref.ref(condition, forget)

    def _call(
        self, order: Evaluate, packed: torch.Tensor, conditions: Sequence[Condition], learned: Sequence[Condition]
    ) -> torch.Tensor:
        ranks = range(1, order.degree if order.alone else self.gpus)
        self._crew.tell(dict.fromkeys(ranks, order))
        with self._together():
            self._seat.spread(learned)
            part, error = self._seat.evaluate(order, packed, conditions)
            answers = self._crew.answers(ranks)
            denoised = part if order.alone else self._seat.gather(order, part)
        if not order.alone:
            self.held = max(answer.conditions for answer in answers)
        return self._result(denoised, error, answers)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around what other ranks take part in: if it fails, the group is lost. Raises UnavailableError."""
        try:
            yield
        except UnavailableError:
            raise
        except BrokenError as broken:
            reason = explained(broken.cause, "a step of several ranks")
            no_memory = isinstance(reason, OutOfMemoryError)
            raise self._crew.failed(f"rank 0: {reason.message}", no_memory=no_memory) from None
        except Exception as fault:
            raise self._crew.failed(f"rank 0: {type(fault).__name__}") from fault

    def _result(self, result: torch.Tensor | None, error: Exception | None, answers: Sequence[Answer]) -> torch.Tensor:
        """What has come of a call, or why nothing has."""
        if error is not None:
            raise error
        _check(answers)
        if self.lost is not None:  # what has come may be what was there before
            raise self.lost
        assert result is not None
        return result

    def _seconds(self, degree: int, x: torch.Tensor, condition: Condition) -> float:
        """Of a step of one picture, once its warm-up is over: the best of three."""
        network = (self._model.card.default_sampler, ())
        t, alpha = torch.tensor([500.0]).to(x.device), torch.tensor([0.5]).to(x.device)
        warm = self._settings.patch_warm_up
        best = float("inf")
        for ran in (0, warm, warm + 1, warm + 2, warm + 3):
            begun = time.monotonic()
            with self.watched():
                self.evaluate(network, (), degree, x, t, alpha, [condition], [PROBE_SLOT], [ran])
                if x.device.type == "cuda":
                    torch.cuda.synchronize(x.device)
            if ran > warm:
                best = min(best, time.monotonic() - begun)
        self.release((x.shape[1], x.shape[2], x.shape[3]), PROBE_SLOT)
        return best

    def _settle(self) -> None:
        """Wait until what was handed over before the last call is done: followers still do their part of that."""
        end = time.monotonic() + SETTLE_S
        while self._before is not None and not self._before.query():
            if time.monotonic() > end:
                return
            time.sleep(0.01)
        self._intact = True

    def _abort(self) -> None:
        """Unblock this process's device: without it, NCCL waits for ranks that are gone."""
        if self._before is not None and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()

    def _leave(self) -> None:
        self._crew.close()
        if not dist.is_initialized():
            return
        if self._before is not None:
            self._abort()  # ends what may still wait for others
        else:
            dist.destroy_process_group()


def devices_of(name: str, gpus: int) -> list[str]:
    """The devices of so many ranks: one after the other from the one named, or the CPU for all.

    Raises:
        SetupError: there are fewer.
    """
    if name == "cpu":
        return ["cpu"] * gpus
    first = 0 if name == "auto" else resolve_device(name).index or 0
    there = torch.cuda.device_count()
    if first + gpus > there:
        behind = f" from cuda:{first} on" if first else ""
        message = f"ranks.gpus: {gpus} is not allowed; {max(0, there - first)} CUDA devices are visible{behind}"
        raise SetupError(f"{message} (with --device cpu the ranks are processes on the CPU)", param="ranks.gpus")
    return [f"cuda:{index}" for index in range(first, first + gpus)]


def launch_of(setting: str, device: torch.device) -> str:
    """How the network of a shared picture is run on the device, one of patch_launch.LAUNCHES. Raises SetupError."""
    if setting == "auto":
        return "capture" if device.type == "cuda" else "eager"
    if setting in ("capture", "graph") and device.type != "cuda":
        message = f"ranks.patch_launch: {setting} is not allowed; auto, eager or compile: a CPU has no CUDA graphs"
        raise SetupError(message, param="ranks.patch_launch")
    return setting


def open_ranks(model: LoadedModel, settings: Settings) -> tuple[Ranks, Degrees] | tuple[None, None]:
    """The ranks that the settings ask for and how many of them may share a picture; nothing for a single GPU.

    Raises SetupError.
    """
    chosen = settings.ranks
    if chosen.gpus == 1:
        if chosen.patch_degree not in ("auto", "1"):
            message = f"ranks.patch_degree: {chosen.patch_degree} is not allowed; 1 or auto: there is one GPU (--gpus)"
            raise SetupError(message, param="ranks.patch_degree")
        return None, None
    degrees = Degrees(model, chosen.gpus, None if chosen.patch_degree == "auto" else int(chosen.patch_degree))
    return Ranks(model, settings.model, chosen), degrees


def get_ready(chosen: ModelSettings, settings: RankSettings) -> None:
    """Before the model is loaded: check that the GPUs are there, and let what followers need be imported meanwhile.

    Raises SetupError.
    """
    if settings.gpus > 1:
        devices = devices_of(chosen.device, settings.gpus)
        if devices[0] == "cpu":
            prepare()


def _check(answers: Iterable[Answer]) -> None:
    """Raise what the first follower that failed has to say."""
    for rank, answer in enumerate(answers, start=1):
        if answer.fault is not None:
            kind = OutOfMemoryError if answer.no_memory else HeadstartError
            raise kind(f"{answer.fault} (on rank {rank})")
