"""Runs a plan and the diffusers scheduler it stands for on the same network, initial noise and noise draws.

Shared by tests/accel/test_samplers.py and bench/samplers.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import diffusers
import torch

from accel.kernels.sampler_step import sampler_step
from accel.samplers.library import build_plan
from accel.samplers.noise import INITIAL_ROW, gaussian
from accel.samplers.plans import Plan
from accel.samplers.schedules import ConsistencySchedule, NoiseSchedule

SHAPE = (3, 6, 6)
STEPS = (1, 2, 4, 10, 25, 50)
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "lcm": ("LCMScheduler", {}),
    "consistency": ("CMStochasticIterativeScheduler", {"clip_denoised": False}),
}

Network = Callable[[torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One scheduler configuration and one number of steps."""

    sampler: str
    prediction: str
    spacing: str
    steps: int
    karras: bool = False
    zero_snr: bool = False
    eta: float = 0.0
    beta_schedule: str = "scaled_linear"

    def scheduler(self) -> Any:
        name, extra = CLASSES[self.sampler]
        options = dict(extra)
        if self.sampler != "consistency":
            options |= {
                "beta_schedule": self.beta_schedule,
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "steps_offset": 1,
                "prediction_type": self.prediction,
                "timestep_spacing": self.spacing,
                "rescale_betas_zero_snr": self.zero_snr,
            }
        if self.karras:
            options["use_karras_sigmas"] = True
        return getattr(diffusers, name)(**options)

    def schedule(self) -> NoiseSchedule:
        """Read from the scheduler's configuration file, as a model folder holds it."""
        return NoiseSchedule.from_config(json.loads(self.scheduler().to_json_string()))

    def plan(self, first: int = 0) -> Plan:
        return build_plan(
            self.sampler,
            self.schedule(),
            self.steps,
            spacing=self.spacing,
            karras=self.karras,
            eta=self.eta,
            first=first,
        )


def cases(sampler: str, prediction: str, spacing: str) -> Iterator[Case]:
    """Every variant and number of steps that both sides define."""
    for steps in STEPS:
        case = Case(sampler, prediction, spacing, steps)
        if sampler == "consistency":
            if steps <= 40:
                yield case
            continue
        for zero_snr in (False, True):
            at_zero = spacing != "leading" and not (sampler == "ddim" and spacing == "linspace" and steps == 1)
            if zero_snr and prediction == "epsilon" and sampler in ("ddim", "lcm") and (at_zero or sampler == "lcm"):
                continue  # x0 from a noise prediction divides by alpha = 0
            yield replace(case, zero_snr=zero_snr)
            if sampler == "ddim":
                yield replace(case, zero_snr=zero_snr, eta=0.7)
            if sampler in ("euler", "dpmpp_2m", "dpmpp_2m_sde"):
                yield replace(case, zero_snr=zero_snr, karras=True)


def combinations() -> list[tuple[str, str, str]]:
    """(sampler, prediction, spacing) of every row of the table. LCM's and consistency's timesteps know no spacing."""
    rows = [
        (sampler, prediction, spacing)
        for sampler in CLASSES
        for prediction in PREDICTIONS
        for spacing in SPACINGS
        if not (sampler == "euler_a" and prediction == "sample")  # not implemented in diffusers
        and not (sampler == "lcm" and spacing != "leading")
        and sampler != "consistency"
    ]
    return [*rows, ("consistency", "consistency", "leading")]


@cache
def toy_network(dtype: torch.dtype) -> Network:
    """A fixed nonlinear function of x and t: [B, C, h, w] -> the same."""
    generator = torch.Generator().manual_seed(5)
    mix, out = (torch.randn(SHAPE[0], SHAPE[0], generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    phase = torch.randn(SHAPE[0], 1, 1, generator=generator, dtype=torch.float64)

    def network(x: torch.Tensor, t: float) -> torch.Tensor:
        hidden = torch.einsum("oc,bchw->bohw", mix, x) + torch.cos(phase * t / 200).to(dtype)
        return 0.5 * x + torch.einsum("oc,bchw->bohw", out, torch.tanh(hidden)) / 3

    return network


def denoised(network: Network, prediction: str, x: torch.Tensor, t: float, alpha: float) -> torch.Tensor:
    """x0 from the network's output, in x's dtype, from what a denoiser is given: x, t and alpha."""
    scale = torch.tensor(alpha, dtype=x.dtype)
    if prediction == "consistency":
        schedule = ConsistencySchedule.create()
        sigma = torch.exp(torch.tensor(t, dtype=torch.float64) / 250).to(x.dtype)
        y, data = x * torch.sqrt(1 + sigma**2), schedule.sigma_data
        c_skip = data**2 / ((sigma - schedule.sigma_min) ** 2 + data**2)
        c_out = (sigma - schedule.sigma_min) * data / torch.sqrt(sigma**2 + data**2)
        return c_skip * y + c_out * network(y / torch.sqrt(sigma**2 + data**2), t)
    output, noise = network(x, t), torch.sqrt(1 - scale**2)
    if prediction == "epsilon":
        return (x - noise * output) / scale
    return scale * x - noise * output if prediction == "v_prediction" else output


def run_plan(plan: Plan, prediction: str, seed: int) -> torch.Tensor:
    """[1, C, h, w] float32 through the fused update, as the engine does it."""
    network = toy_network(torch.float32)
    seeds, slot, finite = torch.tensor([seed]), torch.tensor([0]), torch.tensor([True])
    coefficients = torch.tensor([row[2:] for row in plan.rows], dtype=torch.float32)
    x = plan.init_scale * gaussian(seeds, INITIAL_ROW, SHAPE)
    previous = torch.full_like(x, torch.nan)
    for i, row in enumerate(plan.rows):
        estimate = denoised(network, prediction, x, row.t, row.alpha)
        sampler_step(x, previous, slot, estimate, coefficients[i : i + 1], seeds, torch.tensor([i]), finite)
    assert finite.all()
    return x


def run_plan_in_float64(plan: Plan, prediction: str, seed: int) -> torch.Tensor:
    """The rows alone: the same recurrence written out in float64."""
    network = toy_network(torch.float64)
    initial, *draws = _draws(seed, len(plan))
    x, previous = plan.init_scale * initial, torch.zeros_like(initial)
    for row, noise in zip(plan.rows, draws, strict=True):
        estimate = denoised(network, prediction, x, row.t, row.alpha)
        x = row.a * x + row.b * estimate + row.c * previous + row.s * noise
        previous = estimate
    return x


def run_diffusers(case: Case, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, C, h, w] from the scheduler's own loop; in float64 its tables and casts are float64 too."""
    network = toy_network(dtype)
    scheduler = case.scheduler()
    scheduler.set_timesteps(case.steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else a first timestep that occurs twice starts at the second
    initial, *draws = (noise.to(dtype) for noise in _draws(seed, case.steps))
    x, remaining = initial * scheduler.init_noise_sigma, iter(draws)
    options = {"eta": case.eta} if case.eta else {}
    with ExitStack() as stack:
        module = sys.modules[type(scheduler).__module__]
        stack.enter_context(patch.object(module, "randn_tensor", lambda *_, **__: next(remaining)))
        if dtype == torch.float64:
            stack.enter_context(patch.object(module, "torch", _DoubleTorch()))
            for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
                if hasattr(scheduler, name):
                    setattr(scheduler, name, getattr(scheduler, name).double())
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), float(t))
            x = scheduler.step(output, t, x, **options).prev_sample
    return x


class _DoubleTorch:
    """torch, except that float32 means float64: schedulers cast their sample to float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@cache
def _draws(seed: int, steps: int) -> tuple[torch.Tensor, ...]:
    """The initial noise, then one draw for each row: steps + 1 of [1, C, h, w] float64."""
    rows = torch.arange(INITIAL_ROW, steps)
    return gaussian(torch.full_like(rows, seed), rows, SHAPE).double().split(1)


class Differences(NamedTuple):
    """Largest absolute differences of the final latents, over the largest absolute value."""

    float32: float  # the fused update against the scheduler, both in float32
    float64: float  # the rows against the scheduler, both in float64
    own_rounding: float  # the scheduler in float32 against itself in float64
    our_rounding: float  # the fused update in float32 against the scheduler in float64


def differences(case: Case, seed: int = 11) -> Differences:
    """Run both sides in both precisions."""
    plan = case.plan()
    ours, ours64 = run_plan(plan, case.prediction, seed), run_plan_in_float64(plan, case.prediction, seed)
    theirs, theirs64 = (run_diffusers(case, seed, dtype) for dtype in (torch.float32, torch.float64))
    size = theirs64.abs().max()
    pairs = ((ours, theirs), (ours64, theirs64), (theirs, theirs64), (ours, theirs64))
    return Differences(*(float((one - other).abs().max() / size) for one, other in pairs))
