"""Which patch degree a request gets; through admission, on models of which a few bytes are weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.diffusion.loading import load_model
from models.diffusion.model import DiffusionModel
from service.config import EngineSettings, ModelSettings
from service.diffusion.admission import resolve
from service.diffusion.degrees import WORTHWHILE, Degrees
from service.diffusion.request import Draft
from service.errors import InputError, SetupError
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load(tiny.sd(tmp_path_factory.mktemp("sd") / "tiny"))


def load(folder: Path) -> DiffusionModel:
    return load_model(str(folder), dtype="float32", device="cpu", cache_dir=ModelSettings().cache_dir)


def degree(model: DiffusionModel, degrees: Degrees | None, **changes: object) -> int:
    draft = Draft(**({"prompt": "a red fox", "sampler": "ddim"} | changes))  # type: ignore[arg-type]
    return resolve(draft, model.card, EngineSettings(), id="a", random_seed=0, degrees=degrees).patch_degree


def test_auto_is_the_largest_degree_that_leaves_gpus_most_of_their_time(model: DiffusionModel) -> None:
    degrees = Degrees(model, 4, None)
    assert degree(model, degrees) == 1  # nothing has been measured
    fast, slow = 1 / (1.01 * WORTHWHILE), 1 / (0.99 * WORTHWHILE)
    degrees.seconds = {
        64: {1: 1.0, 2: slow / 2, 4: slow / 4},
        256: {1: 1.0, 2: fast / 2, 4: slow / 4},
        1024: {1: 1.0, 2: slow / 2, 4: fast / 4},
    }
    sizes = {(64, 64): 1, (128, 128): 2, (128, 192): 2, (256, 256): 4, (512, 512): 4, (256, 264): 1}
    chosen = {(width, height): degree(model, degrees, width=width, height=height) for width, height in sizes}
    assert chosen == sizes  # 33 latent rows cannot be shared out among 4, and 2 are not worth it there


def test_the_operators_degree_is_lowered_where_a_size_does_not_allow_it(model: DiffusionModel) -> None:
    degrees = Degrees(model, 4, 4)
    heights = {128: 4, 96: 2, 72: 1}  # without guidance 4 need latent rows in multiples of 8, and 2 in multiples of 4
    assert {height: degree(model, degrees, height=height, guidance_scale=1.0) for height in heights} == heights


def test_a_request_has_the_last_word(model: DiffusionModel) -> None:
    assert degree(model, Degrees(model, 4, 4), patch_degree=1) == 1
    assert degree(model, Degrees(model, 4, 1), patch_degree=4) == 4
    assert degree(model, None, patch_degree=1) == 1


@pytest.mark.parametrize(
    ("gpus", "asked", "told"),
    [
        (None, 2, "patch_degree: 2 is not allowed; 1 or nothing: this server draws on one GPU"),
        (4, 3, "patch_degree: 3 is not allowed; this server draws on 4 GPUs: one of 1, 2, 4"),
        (3, 4, "patch_degree: 4 is not allowed; this server draws on 3 GPUs: one of 1, 2"),
        (8, 8, "patch_degree: 8 is not allowed; patch_degree 8 needs latent rows in multiples of 8, and this picture"),
    ],
)
def test_degrees_that_a_request_cannot_have(model: DiffusionModel, gpus: int | None, asked: int, told: str) -> None:
    degrees = None if gpus is None else Degrees(model, gpus, None)
    with pytest.raises(InputError) as error:
        degree(model, degrees, patch_degree=asked, height=72)
    assert error.value.message.startswith(told)
    assert error.value.param == "patch_degree"


def test_a_model_without_a_patch_plan(tmp_path: Path) -> None:
    pixels = load(tiny.consistency(tmp_path / "consistency"))
    drawn = {"sampler": None, "prompt": "", "guidance_scale": None}
    assert degree(pixels, Degrees(pixels, 2, None), **drawn) == 1
    with pytest.raises(InputError, match="ConsistencyDenoiser has no patch plan; patch_degree 1 would work"):
        degree(pixels, Degrees(pixels, 2, None), patch_degree=2, **drawn)
    with pytest.raises(SetupError, match="patch_degree: a ConsistencyDenoiser has no patch plan"):
        Degrees(pixels, 2, 2)
