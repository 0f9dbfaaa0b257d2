"""Consistency functions against the papers' formulas."""

import torch
from diffusers import LCMScheduler
from hypothesis import given
from hypothesis import strategies as st

from models.training.forms import edm_form, lcm_form
from models.training.schedule import NoiseLevels, alphas_cumprod

CPU = torch.device("cpu")
LOW = NoiseLevels(CPU).low


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).unbind()


@given(st.integers(0, 1000))
def test_the_boundary_is_the_identity_exactly(seed: int) -> None:
    x, v = inputs(seed)
    form = edm_form(torch.full((3,), LOW), LOW)
    assert torch.equal(form.value(100 * v, x), x)


def test_consistency_formulas_of_song_et_al() -> None:
    x, v = inputs()
    sigma, data, low = torch.tensor([0.05, 1.7, 80.0]), 1.0, LOW
    form = edm_form(sigma, low)
    s = sigma[:, None, None, None]
    c_skip = data**2 / ((s - low) ** 2 + data**2)
    c_out = data * (s - low) / (s**2 + data**2).sqrt()
    c_in = 1 / (s**2 + data**2).sqrt()
    torch.testing.assert_close(form.value(v, x), c_skip * x + c_out * -v)
    torch.testing.assert_close(form.seen(x), c_in * x)


def test_velocity_is_edms_network_with_the_sign_turned() -> None:
    """D of Karras et al. with F = -v, on x_ve, is x0 of the v-prediction, on x_vp."""
    x0, noise = inputs()
    sigma = torch.tensor([0.03, 1.0, 80.0])
    s = sigma[:, None, None, None].double()
    alpha = 1 / (1 + s**2).sqrt()
    v = alpha * noise - s * alpha * x0
    form = edm_form(sigma, 0.0)
    x = x0 + s * noise
    torch.testing.assert_close(form.value(v, x), x0.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(form.seen(x), alpha * x, rtol=1e-5, atol=1e-5)


def test_lcm_form_is_the_schedulers() -> None:
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True,
        prediction_type="v_prediction", clip_sample=False,
    )  # fmt: skip
    scheduler.set_timesteps(4)
    x, v = inputs()
    for now in scheduler.timesteps:
        t = now.repeat(3)
        ours = lcm_form(t.float(), alphas_cumprod(CPU)[t]).value(v, x)
        theirs = scheduler.step(v, now, x, generator=torch.Generator(), return_dict=False)[1]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
