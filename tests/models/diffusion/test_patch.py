"""Which pictures can be shared out, and that installing patch modules changes no weights and no results."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel.patch.conv import PatchConv2d, PatchInputConv2d
from accel.patch.mesh import Mesh
from accel.patch.norm import PatchGroupNorm
from models.diffusion.loaded import LoadedModel
from models.diffusion.loading import load_model
from models.diffusion.patch import PatchPlan, cross_attentions, install, patch_plan
from models.diffusion.patch_denoiser import PatchDenoiser
from models.diffusion.patch_launch import Launcher
from models.diffusion.patch_vae import PatchDecoder
from models.diffusion.vae import PixelDecoder
from models.errors import PatchError
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    return load_model(str(tiny.sdxl(tmp_path / "model")), dtype="float32", device="cpu", cache_dir=tmp_path)


def test_plan_of_a_unet(model: LoadedModel) -> None:
    plan = patch_plan(model.denoiser("ddim"))
    assert plan == PatchPlan(halvings=1)
    plan.check(4, 16, guided=True)
    with pytest.raises(
        PatchError, match="patch_degree 4 needs latent rows in multiples of 8, and this picture has 12; with 12 rows"
    ):
        plan.check(4, 12, guided=False)
    with pytest.raises(PatchError, match="with 12 rows patch_degree 1, 2, 3 would work"):
        plan.check(4, 12, guided=False)
    with pytest.raises(PatchError, match="patch_degree 0 is not allowed; allowed: at least 1"):
        plan.check(0, 12, guided=False)


@given(st.integers(0, 3), st.integers(1, 300), st.integers(1, 9), st.booleans())
def test_degrees_are_those_that_pass(halvings: int, rows: int, most: int, guided: bool) -> None:
    plan = PatchPlan(halvings)
    degrees = plan.degrees(rows, most, guided=guided)
    assert degrees[0] == 1
    for degree in range(1, most + 1):
        if degree in degrees:
            plan.check(degree, rows, guided=guided)
            parts = plan.parts(degree, guided=guided)
            assert parts == 1 or rows % (parts * 2**halvings) == 0
        else:
            with pytest.raises(PatchError):
                plan.check(degree, rows, guided=guided)


def test_options_that_cannot_be(model: LoadedModel) -> None:
    denoiser, mesh = model.denoiser("ddim"), cast(Mesh, None)
    with pytest.raises(ValueError, match="warm_up: 0; allowed: at least 1"):
        PatchDenoiser(denoiser, mesh, None, warm_up=0)
    with pytest.raises(ValueError, match="mode: 'fast'; allowed: displaced, full_sync"):
        PatchDenoiser(denoiser, mesh, None, mode="fast")
    with pytest.raises(ValueError, match="launch: 'graph'; allowed on cpu: eager, compile"):
        Launcher(denoiser.network, "graph", CPU)
    with pytest.raises(PatchError, match="a PixelDecoder has no patch plan"):
        PatchDecoder(PixelDecoder(), mesh, None)


def test_kinds_without_a_plan(tmp_path: Path, model: LoadedModel) -> None:
    pixels = load_model(str(tiny.consistency(tmp_path / "pixels")), dtype="float32", device="cpu", cache_dir=tmp_path)
    with pytest.raises(PatchError, match="a ConsistencyDenoiser has no patch plan; patch_degree 1 would work"):
        patch_plan(pixels.denoiser("consistency"))
    unet = model.denoiser("ddim").network
    unet.register_to_config(mid_block_type="UNetMidBlock2DSimpleCrossAttn")
    with pytest.raises(PatchError, match="a network with UNetMidBlock2DSimpleCrossAttn has no patch plan"):
        patch_plan(model.denoiser("ddim"))
    unet.register_to_config(mid_block_type="UNetMidBlock2DCrossAttn", downsample_padding=0)
    with pytest.raises(PatchError, match="a network with downsample_padding 0 has no patch plan"):
        patch_plan(model.denoiser("ddim"))


def test_a_module_without_a_twin_changes_nothing(model: LoadedModel) -> None:
    unet = model.denoiser("ddim").network
    unet.down_blocks[0].resnets[0].conv2 = torch.nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
    before = list(unet.modules())
    with pytest.raises(PatchError, match=r"padding \(1, 1\) \(reflect\) .* at down_blocks.0.resnets.0.conv2"):
        install(unet, CPU, entry="conv_in")
    assert list(unet.modules()) == before


def test_installing_keeps_weights_names_and_results(model: LoadedModel) -> None:
    denoiser = model.denoiser("ddim")
    unet = denoiser.network
    weights = {name: weight.data_ptr() for name, weight in unet.state_dict().items()}
    conditions = model.encode([("a fox", "dog")], [3.0], "ddim", (64, 64))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.tensor([0.5]), conditions
    before = denoiser(*inputs)
    link = install(unet, CPU, entry="conv_in")
    assert install(unet, CPU, entry="conv_in") is link
    assert {name: weight.data_ptr() for name, weight in unet.state_dict().items()} == weights
    assert torch.equal(denoiser(*inputs), before)

    assert isinstance(unet.conv_in, PatchInputConv2d)
    wide = [module for module in unet.modules() if isinstance(module, torch.nn.Conv2d) and max(module.kernel_size) > 1]
    norms = [module for module in unet.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert all(isinstance(module, PatchConv2d) for module in wide)
    assert all(isinstance(module, PatchGroupNorm) for module in norms)
    assert len(cross_attentions(unet)) == 4
