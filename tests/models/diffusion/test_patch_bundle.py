"""The default bundle on four ranks: what training makes of a network is what lets displaced patches work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from accel.patch.mesh import make_mesh
from accel.samplers.library import build_plan
from models.diffusion.loading import load_model
from service.config import ModelSettings
from tests.accel.patch.ranks import run_ranks
from tests.models.diffusion.patching import CPU, Group, Job, draw

CACHE = ModelSettings().cache_dir
STEPS = 6
SHAPE = (4, 32, 32)


def run(rank: int) -> dict[str, Any]:
    """Latents and the picture of one prompt by one rank and by four, by mode."""
    mesh = make_mesh((0, 1, 2, 3), device=CPU)
    assert mesh is not None
    group = Group(mesh)
    model = load_model("default", dtype="float32", device="cpu", cache_dir=CACHE)
    condition = model.encode([("a red apple on a blue background", "")], [3.0], "ddim", (256, 256))[0]
    plan = build_plan("ddim", model.schedule("ddim"), STEPS, spacing="trailing")
    jobs = [Job(5, condition, slot=0)]
    found: dict[str, Any] = {}
    if mesh.leads:
        found["one rank"] = draw(model.denoiser("ddim"), plan, jobs, shape=SHAPE)[0]
    for mode in ("full_sync", "displaced", "no_sync"):
        patch = group.denoiser(model, mode=mode, warm_up=2)
        latents = group.lead(patch, lambda patch=patch: draw(patch, plan, jobs, shape=SHAPE, known=True))
        if mesh.leads:
            found[mode] = latents[0]
    return {mode: (latent, model.decode(latent[None])[0].numpy()) for mode, latent in found.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, np.ndarray]]:
    folder = tmp_path_factory.mktemp("ranks")
    pictures: dict[str, tuple[torch.Tensor, np.ndarray]] = run_ranks(run, 4, folder)[0]
    return pictures


def psnr(found: dict[str, tuple[torch.Tensor, np.ndarray]], mode: str) -> float:
    error = np.square(found[mode][1].astype(np.float64) - found["one rank"][1]).mean()
    return float(10 * np.log10(255**2 / error)) if error else 99.0


def test_synchronous_pictures_are_those_of_one_rank(found: dict[str, tuple[torch.Tensor, np.ndarray]]) -> None:
    latents = found["one rank"][0]
    assert float((found["full_sync"][0] - latents).abs().max() / latents.abs().max()) < 1e-4
    assert psnr(found, "full_sync") > 50


def test_displaced_pictures_are_nearly_those_of_one_rank(found: dict[str, tuple[torch.Tensor, np.ndarray]]) -> None:
    assert psnr(found, "displaced") > 23
    assert psnr(found, "displaced") > psnr(found, "no_sync") + 3
