"""Followers on the CPU, in processes of their own: what they compute, what they keep, and what becomes of faults."""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from accel.samplers.plans import Plan
from models.diffusion.loading import load_model
from models.diffusion.model import Condition, DiffusionModel
from service.config import EngineSettings, ModelSettings, RankSettings, Settings
from service.diffusion.admission import resolve
from service.diffusion.crew import RankError
from service.diffusion.degrees import Degrees
from service.diffusion.engine import DiffusionEngine
from service.diffusion.ranks import Ranks, get_ready, open_ranks
from service.diffusion.request import CacheIntent, Completed, Draft, Image, ImageRequest
from service.diffusion.shares import share
from service.diffusion.starts import Start, Starts
from service.errors import OutOfMemoryError, SetupError
from service.events import Event, Failed
from tests import tiny
from tests.service.diffusion.toy import drain

GPUS = 4
WARM_UP = 3
LORAS = (("ink", 0.8),)
PLAIN = ("ddim", ())


def settings_of(folder: Path, gpus: int, **changes: object) -> Settings:
    lora = folder / "ink.safetensors"
    return Settings(
        model=ModelSettings(model=str(folder), dtype="float32", device="cpu", loras=(("ink", str(lora)),)),
        engine=EngineSettings(max_batch=16, max_pixels=512 * 512),
        ranks=replace(RankSettings(gpus=gpus, patch_degree="1", patch_warm_up=WARM_UP), **changes),  # type: ignore[arg-type]
    )


def load(settings: Settings) -> DiffusionModel:
    chosen = settings.model
    return load_model(
        chosen.model, dtype=chosen.dtype, device=chosen.device, loras=chosen.loras, cache_dir=chosen.cache_dir
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    get_ready(ModelSettings(device="cpu"), RankSettings(gpus=GPUS))  # imports for followers run beside ours
    folder = tiny.sd(tmp_path_factory.mktemp("model") / "tiny")
    tiny.lora(folder / "ink.safetensors", folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    return load(settings_of(folder, GPUS))


@pytest.fixture(scope="module")
def group(folder: Path, model: DiffusionModel) -> Iterator[tuple[Ranks, Degrees]]:
    ranks, degrees = open_ranks(model, settings_of(folder, GPUS))
    assert ranks is not None
    assert degrees is not None
    yield ranks, degrees
    ranks.close()


@pytest.fixture
def ranks(group: tuple[Ranks, Degrees]) -> Ranks:
    """The group, started anew if the test before has left it lost."""
    if group[0].lost is not None:
        group[0].restart()
    return group[0]


def conditions_of(model: DiffusionModel, count: int) -> list[Condition]:
    prompts = [(f"a red fox {index}", "blue") for index in range(count)]
    return model.encode(prompts, [5.0 if index % 3 else 1.0 for index in range(count)], "ddim", (64, 64))


def rows_of(count: int, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(count))
    t = torch.linspace(900, 20, count)
    return x, t, torch.linspace(0.1, 0.98, count)


def call(
    ranks: Ranks, model: DiffusionModel, count: int, loras: tuple[tuple[str, float], ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the ranks say to rows at different noise levels, and what one rank says."""
    model.use_loras(loras)
    conditions, (x, t, alpha) = conditions_of(model, count), rows_of(count)
    many = ranks.evaluate(PLAIN, loras, 1, x, t, alpha, conditions, range(count), [0] * count)
    return many, model.denoiser(*PLAIN)(x, t, alpha, conditions)


def request(model: DiffusionModel, degrees: Degrees, id: str = "a", **changes: object) -> ImageRequest:
    draft = Draft(**({"prompt": f"a red fox {id}", "seed": 7, "sampler": "ddim"} | changes))  # type: ignore[arg-type]
    return resolve(draft, model.card, EngineSettings(), id=id, random_seed=0, degrees=degrees)


def pictures(events: Sequence[Event]) -> dict[tuple[str, int], np.ndarray]:
    failed = [event.error for event in events if isinstance(event, Failed)]
    assert not failed
    return {
        (event.request_id, event.index): np.asarray(event.pixels).astype(int)
        for event in events
        if isinstance(event, Image)
    }


def largest_difference(ones: dict[tuple[str, int], np.ndarray], others: dict[tuple[str, int], np.ndarray]) -> int:
    assert ones.keys() == others.keys()
    return max(int(np.abs(one - others[name]).max()) for name, one in ones.items())


def draw(
    model: DiffusionModel,
    requests: Sequence[ImageRequest],
    ranks: Ranks | None,
    *,
    apart: bool = True,
    starts: Starts | None = None,
) -> list[Event]:
    """`apart`: two steps lie between requests, so that they are at different rows."""
    engine = DiffusionEngine(model, EngineSettings(), ranks=ranks, starts=starts)
    events: list[Event] = []
    for each in requests:
        engine.add(each)
        if apart:
            events += [*engine.step(), *engine.step()]
    return events + drain(engine)


def test_every_row_goes_to_the_team_with_the_least_work() -> None:
    assert share([2, 2, 1, 1, 1], 2) == ((0, 2, 4), (1, 3))
    assert share([1, 1], 4) == ((0,), (1,))


@pytest.mark.parametrize(("count", "loras"), [(1, ()), (3, ()), (9, ()), (5, LORAS)])
def test_replicas_say_what_one_rank_says(
    ranks: Ranks, model: DiffusionModel, count: int, loras: tuple[tuple[str, float], ...]
) -> None:
    many, one = call(ranks, model, count, loras)
    torch.testing.assert_close(many, one, atol=1e-5, rtol=1e-5)
    model.use_loras(())


def test_requests_at_different_rows_are_drawn_as_by_one_rank(
    ranks: Ranks, group: tuple[Ranks, Degrees], model: DiffusionModel
) -> None:
    drafts: list[dict[str, object]] = [
        {"num_inference_steps": 9, "n": 3},
        {"num_inference_steps": 5, "sampler": "euler_a", "guidance_scale": 1.0},
        {"num_inference_steps": 6, "loras": LORAS, "n": 2},
        {"num_inference_steps": 4, "width": 96, "n": 2},
    ]
    requests = [request(model, group[1], str(index), **draft) for index, draft in enumerate(drafts)]
    assert largest_difference(pictures(draw(model, requests, ranks)), pictures(draw(model, requests, None))) <= 1


@pytest.mark.parametrize(
    "wanted",  # of each request: degree, pictures, steps
    [
        [(2, 3, WARM_UP), (2, 3, WARM_UP)],
        [(4, 3, 2), (4, 3, WARM_UP)],
        [(2, 1, 1), (2, 1, WARM_UP)],  # the first team has none left
        [(2, 2, WARM_UP), (4, 1, WARM_UP), (1, 2, WARM_UP)],
    ],
)
def test_shared_pictures_in_their_warm_up_are_those_of_one_rank(
    ranks: Ranks, group: tuple[Ranks, Degrees], model: DiffusionModel, wanted: list[tuple[int, int, int]]
) -> None:
    """Of degree 2 there are two teams, and pictures stay with theirs. Those of different degrees take turns."""
    requests = [
        request(model, group[1], str(index), patch_degree=degree, n=n, num_inference_steps=steps, height=128)
        for index, (degree, n, steps) in enumerate(wanted)
    ]
    events = draw(model, requests, ranks, apart=False)
    assert largest_difference(pictures(events), pictures(draw(model, requests, None))) <= 1
    told = {event.request_id: event.timings.patch_degree for event in events if isinstance(event, Completed)}
    assert told == {str(index): degree for index, (degree, _, _) in enumerate(wanted)}


class Found:
    """A cache that starts every picture from one latent, at one row."""

    def __init__(self, row: int) -> None:
        self.row = row
        latent = np.random.default_rng(3).normal(size=(4, 16, 8)).astype(np.float16)
        self.start = Start(latent, 0.999, 0.9, row)

    def find(self, request: ImageRequest, plan: Plan) -> list[Start | None]:
        return [self.start] * request.n

    def marks(self, request: ImageRequest, plan: Plan) -> list[int]:
        return []

    def keep(self, request: ImageRequest, latents: object) -> None: ...


def test_a_shared_picture_from_the_cache_warms_up_again(
    ranks: Ranks, group: tuple[Ranks, Degrees], model: DiffusionModel
) -> None:
    """With WARM_UP rows left it is the picture of one rank; with more left it is not, for ranks then look back."""
    differences = {}
    for left in (WARM_UP, 12):
        intent = CacheIntent(embedding=None, look=True, store=False)
        steps = 20
        draft = request(model, group[1], patch_degree=4, num_inference_steps=steps, height=128, guidance_scale=1.0)
        cached = replace(draft, cache=intent)
        events = draw(model, [cached], ranks, starts=Found(steps - left))
        (image,) = [event for event in events if isinstance(event, Image)]
        assert (image.cache_result, image.steps_run) == ("hit", left)
        alone = draw(model, [cached], None, starts=Found(steps - left))
        one, other = (np.asarray(next(e for e in each if isinstance(e, Image)).pixels) for each in (events, alone))
        differences[left] = np.abs(one.astype(float) - other.astype(float)).mean()
    assert differences[WARM_UP] < 0.01
    assert differences[12] > 10 * differences[WARM_UP]


def test_followers_forget_the_conditions_that_rank_0_forgets(ranks: Ranks, model: DiffusionModel) -> None:
    calls, rows = 12, 6
    for _ in range(calls):
        call(ranks, model, rows)
    gc.collect()
    call(ranks, model, rows)
    assert rows <= ranks.held <= 6 * rows  # the denoiser keeps a few batches; of all calls that would be 78


def limit_memory(pid: int) -> None:
    """Let a process have no more than it has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))


def test_a_follower_without_memory_says_so_and_stays_in_step(ranks: Ranks, model: DiffusionModel) -> None:
    """The engine then splits the batch (test_engine_faults)."""
    conditions, (x, t, alpha) = conditions_of(model, 64), rows_of(64, side=32)
    limit_memory(ranks.pids[1])
    with pytest.raises(OutOfMemoryError, match="on rank 2"):
        ranks.evaluate(PLAIN, (), 1, x, t, alpha, conditions, range(64), [0] * 64)
    assert ranks.lost is None
    torch.testing.assert_close(*call(ranks, model, 2), atol=1e-5, rtol=1e-5)
    ranks.restart()  # its library remembers of what it could not make a kernel


def test_a_follower_without_memory_within_a_shared_picture(
    ranks: Ranks, group: tuple[Ranks, Degrees], model: DiffusionModel
) -> None:
    """Ranks that wait for it can do no more: the group is started anew, and the batch is split; nothing is lost."""
    side = 160  # of which no kernels have been made yet
    shared = [
        request(model, group[1], str(index), patch_degree=4, num_inference_steps=2, n=4, width=side, height=side)
        for index in range(2)
    ]
    engine = DiffusionEngine(model, EngineSettings(max_batch=16), ranks=ranks)
    for each in shared:
        engine.add(each)
    restarts = ranks.restarts
    limit_memory(ranks.pids[1])
    events = drain(engine)
    assert ranks.restarts == restarts + 1
    assert largest_difference(pictures(events), pictures(draw(model, shared, None))) <= 1


@pytest.mark.parametrize("degree", [1, 4])
def test_a_follower_that_dies_fails_what_runs_and_nothing_else(
    ranks: Ranks, group: tuple[Ranks, Degrees], model: DiffusionModel, degree: int
) -> None:
    engine = DiffusionEngine(model, EngineSettings(max_running=2), ranks=ranks)
    for name in ("first", "second", "third"):  # the last finds no slot free
        engine.add(request(model, group[1], name, num_inference_steps=40, patch_degree=degree))
    for _ in range(5):
        engine.step()
    restarts = ranks.restarts
    os.kill(ranks.pids[-1], signal.SIGKILL)
    events = drain(engine)
    errors = {event.request_id: event.error for event in events if isinstance(event, Failed)}
    assert errors.keys() == {"first", "second"}
    assert all(isinstance(error, RankError) and error.status == 503 for error in errors.values())
    assert "rank 3: has died" in str(errors["first"])
    assert [event.request_id for event in events if isinstance(event, Image)] == ["third"]
    assert ranks.restarts == restarts + 1


def test_ranks_that_cannot_be_started_again_fail_requests_until_they_can(
    ranks: Ranks, group: tuple[Ranks, Degrees], model: DiffusionModel, folder: Path
) -> None:
    engine = DiffusionEngine(model, EngineSettings(), ranks=ranks)
    hidden = folder.with_name("hidden")
    os.kill(ranks.pids[0], signal.SIGKILL)
    while ranks.lost is None:
        time.sleep(0.01)
    folder.rename(hidden)
    engine.add(request(model, group[1], "early"))
    (failed,) = [event for event in drain(engine) if isinstance(event, Failed)]
    assert isinstance(failed.error, Exception)
    assert "cannot be started" in str(failed.error)
    assert not engine.has_work()
    hidden.rename(folder)
    engine.add(request(model, group[1], "late", num_inference_steps=2))
    assert pictures(drain(engine)).keys() == {("late", 0)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"patch_degree": "2"}, "ranks.patch_degree: 2 is not allowed; 1 or auto"),
        ({"gpus": 2, "patch_degree": "4"}, "ranks.patch_degree: 4 is not allowed; at most the number of GPUs, 2"),
        ({"gpus": 2, "patch_launch": "graph"}, "ranks.patch_launch: graph is not allowed"),
    ],
)
def test_settings_that_cannot_be_met(model: DiffusionModel, changes: dict[str, object], told: str) -> None:
    chosen = Settings(ranks=replace(RankSettings(), **changes))  # type: ignore[arg-type]
    with pytest.raises(SetupError, match=told):
        open_ranks(model, chosen)


def test_fewer_gpus_than_are_asked_for() -> None:
    with pytest.raises(SetupError, match="gpus: 64 is not allowed; ") as told:
        get_ready(ModelSettings(device="auto"), RankSettings(gpus=64))
    assert f"{torch.cuda.device_count()} CUDA devices are visible" in told.value.message
