"""The samplers, each a pure function from a noise schedule to the rows of a plan.

Symbols: alpha is the signal scale of the variance-preserving space, sigma the noise-to-signal ratio of the
variance-exploding space that Euler, DPM++ and consistency models are written in: alpha = 1 / sqrt(1 + sigma^2). A
latent y there is x = alpha y here, and noise = alpha sigma = sqrt(1 - alpha^2) is the scale of the noise in x. An
update y <- A y + B denoised + S z from sigma to sigma' becomes x <- (alpha'/alpha) A x + alpha' (B denoised + S z).

To add a sampler: write one function (schedule, steps, spacing, its options) -> (rows, init_scale), and enter it in
SAMPLERS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from accel.samplers.plans import Plan, Row
from accel.samplers.schedules import (
    SPACINGS,
    Array,
    ConsistencySchedule,
    LatentConsistencySchedule,
    NoiseSchedule,
    in_float32,
    karras_sigmas,
    spaced_timesteps,
)

SAME_LEVEL = 1e-6  # alphas no further apart are one noise level

Rows = tuple[list[Row], float]  # rows, and the standard deviation of the initial noise


def ddim(schedule: NoiseSchedule, steps: int, spacing: str, *, eta: float) -> Rows:
    """Song, Meng & Ermon 2021 (DDIM), equations 12 and 16: eta 0 is deterministic, eta 1 is DDPM."""
    timesteps = spaced_timesteps(schedule, steps, spacing)
    stride = len(schedule) // steps
    final = 1.0 if schedule.set_alpha_to_one else float(schedule.alphas_cumprod[0])
    rows = []
    for t in timesteps.astype(int):
        now = float(schedule.alphas_cumprod[t])
        after = float(schedule.alphas_cumprod[t - stride]) if t >= stride else final
        s = eta * ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5
        a = max((1 - after - s**2) / (1 - now), 0.0) ** 0.5  # rounding can take it below 0 at eta 1
        rows.append(Row(t=float(t), alpha=now**0.5, a=a, b=after**0.5 - a * now**0.5, c=0.0, s=s))
    return rows, 1.0


def euler(schedule: NoiseSchedule, steps: int, spacing: str, *, karras: bool) -> Rows:
    """Karras et al. 2022, algorithm 1 without its second-order correction (k-diffusion's sample_euler).

    y <- y + (y - denoised) / sigma * (sigma' - sigma), so A = sigma'/sigma and B = 1 - sigma'/sigma.
    """
    timesteps, sigmas = _euler_grid(schedule, steps, spacing, karras)
    alphas, noises = _alphas_and_noises(sigmas)
    rows = []
    for i, t in enumerate(timesteps):
        a = noises[i + 1] / noises[i]
        rows.append(Row(t=float(t), alpha=alphas[i], a=a, b=alphas[i + 1] - a * alphas[i], c=0.0, s=0.0))
    return rows, _euler_init_scale(spacing, noises)


def euler_a(schedule: NoiseSchedule, steps: int, spacing: str) -> Rows:
    """Ancestral Euler (k-diffusion's sample_euler_ancestral): Euler to sigma_down, then noise back up to sigma'.

    DDPM's posterior variance (Ho et al. 2020, equation 7) in terms of sigma:
    sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2, sigma_down^2 = sigma'^2 - sigma_up^2 = (sigma'^2 / sigma)^2.
    """
    timesteps, sigmas = _euler_grid(schedule, steps, spacing, karras=False)
    alphas, noises = _alphas_and_noises(sigmas)
    rows = []
    for i, t in enumerate(timesteps):
        ratio = sigmas[i + 1] / sigmas[i]
        a = noises[i + 1] * ratio / noises[i]
        b = alphas[i + 1] * (1 - ratio**2)
        s = noises[i + 1] * max(1 - ratio**2, 0.0) ** 0.5
        rows.append(Row(t=float(t), alpha=alphas[i], a=a, b=b, c=0.0, s=s))
    return rows, _euler_init_scale(spacing, noises)


def dpmpp_2m(schedule: NoiseSchedule, steps: int, spacing: str, *, karras: bool) -> Rows:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2: second-order multistep, midpoint form.

    With lambda = ln(alpha/noise), h = lambda' - lambda, r = h_before / h and phi = alpha' (1 - e^-h):
    x <- (noise'/noise) x + phi (denoised + (denoised - previous) / 2r); first order for the first and the last row.
    """
    timesteps, sigmas = _dpm_grid(schedule, steps, spacing, karras)
    alphas, noises = _alphas_and_noises(sigmas)
    rows = []
    for i, t in enumerate(timesteps):
        a = noises[i + 1] / noises[i]
        phi = alphas[i + 1] - a * alphas[i]
        c = -phi * _half_inverse_r(sigmas, i)
        rows.append(Row(t=float(t), alpha=alphas[i], a=a, b=phi - c, c=c, s=0.0))
    return rows, 1.0


def dpmpp_2m_sde(schedule: NoiseSchedule, steps: int, spacing: str, *, karras: bool) -> Rows:
    """The stochastic form of DPM-Solver++ 2M (Lu et al. 2022, section 5 and appendix; diffusers' sde-dpmsolver++).

    As dpmpp_2m with phi = alpha' (1 - e^-2h), x scaled by (noise'/noise) e^-h, and noise' sqrt(1 - e^-2h) of new noise.
    """
    timesteps, sigmas = _dpm_grid(schedule, steps, spacing, karras)
    alphas, noises = _alphas_and_noises(sigmas)
    rows = []
    for i, t in enumerate(timesteps):
        decay = sigmas[i + 1] / sigmas[i]  # e^-h
        fresh = 1 - decay**2
        phi = alphas[i + 1] * fresh
        c = -phi * _half_inverse_r(sigmas, i)
        a = noises[i + 1] / noises[i] * decay
        rows.append(Row(t=float(t), alpha=alphas[i], a=a, b=phi - c, c=c, s=noises[i + 1] * fresh**0.5))
    return rows, 1.0


def lcm(schedule: NoiseSchedule, steps: int, spacing: str) -> Rows:
    """Luo et al. 2023 (latent consistency models), algorithm 3, its boundary condition folded into a and b.

    f = c_skip x + c_out denoised with c_skip, c_out of Song et al. 2023, appendix C, at timestep_scaling * t; then
    noise up to the next timestep. The timesteps are spread over the distillation grid, so spacing changes nothing.
    """
    grid = schedule.original_inference_steps
    if not 1 <= steps <= grid:
        raise ValueError(f"steps: {steps}; allowed: 1 to {grid} for lcm")
    distilled = np.arange(1, grid + 1)[::-1] * (len(schedule) // grid) - 1
    timesteps = distilled[np.floor(np.linspace(0, grid, steps, endpoint=False)).astype(int)]
    rows = []
    for i, t in enumerate(timesteps):
        scaled = float(t) * schedule.timestep_scaling
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        after = float(schedule.alphas_cumprod[timesteps[i + 1]]) if i + 1 < steps else 1.0
        alpha, scale = float(schedule.alphas_cumprod[t]) ** 0.5, after**0.5
        rows.append(Row(t=float(t), alpha=alpha, a=scale * c_skip, b=scale * c_out, c=0.0, s=(1 - after) ** 0.5))
    return rows, 1.0


def consistency(schedule: NoiseSchedule, steps: int, spacing: str) -> Rows:
    """Song et al. 2023, algorithm 1 (multistep consistency sampling): y <- f(y) + sqrt(sigma'^2 - sigma_min^2) z.

    In pixel space or in latent space, as the schedule has it. denoised is f itself: the boundary condition (and
    clipping) belongs to the denoiser. Spacing changes nothing.
    """
    assert isinstance(schedule, ConsistencySchedule | LatentConsistencySchedule)
    sigmas = schedule.sampling_sigmas(steps)
    timesteps = schedule.timesteps_of(sigmas)
    alphas, noises = _alphas_and_noises(sigmas)
    rows = []
    for i, t in enumerate(timesteps):
        b, s = 1.0, 0.0
        if i + 1 < steps:
            b, s = alphas[i + 1], alphas[i + 1] * max(sigmas[i + 1] ** 2 - schedule.sigma_min**2, 0.0) ** 0.5
        rows.append(Row(t=float(t), alpha=alphas[i], a=0.0, b=b, c=0.0, s=s))
    return rows, float(noises[0])


@dataclass(frozen=True, slots=True)
class Sampler:
    """One entry of the library.

    rows: (schedule, steps, spacing, **options) -> (rows of the full plan, init_scale).
    schedule: kind of the schedules it runs on.
    options: which of build_plan's options it takes.
    most_steps: (schedule) -> the largest number of steps that there is a plan of.
    """

    rows: Callable[..., Rows]
    description: str
    schedule: str = "discrete"
    options: tuple[str, ...] = ()
    most_steps: Callable[[Any], int] = len


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, "deterministic at eta 0, DDPM's noise at eta 1", options=("eta",)),
    "euler": Sampler(euler, "first-order ODE solver in sigma", options=("karras",)),
    "euler_a": Sampler(euler_a, "Euler with fresh noise at every step"),
    "dpmpp_2m": Sampler(dpmpp_2m, "second-order multistep ODE solver, good from 15 steps", options=("karras",)),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, "DPM++ 2M with fresh noise at every step", options=("karras",)),
    "lcm": Sampler(
        lcm,
        "few steps of a network distilled as a latent consistency model",
        most_steps=lambda schedule: int(schedule.original_inference_steps),
    ),
    "consistency": Sampler(
        consistency,
        "few steps of a consistency model, in pixel or latent space",
        schedule="consistency",
        most_steps=lambda schedule: int(schedule.most_steps),
    ),
}


def build_plan(
    sampler: str,
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: str,
    karras: bool = False,
    eta: float = 0.0,
    first: int = 0,
) -> Plan:
    """Plan `steps` steps, and keep the rows from `first` on.

    A plan entered late has no previous estimate, so its first row is the first-order one: previous = denoised.

    Raises:
        ValueError: an argument is unknown, out of range, or not one that the sampler or schedule can honour.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: {sampler!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: {spacing!r} is unknown; allowed: {', '.join(SPACINGS)}")
    entry = SAMPLERS[sampler]
    if schedule.kind != entry.schedule:
        able = ", ".join(name for name, other in SAMPLERS.items() if other.schedule == schedule.kind)
        raise ValueError(f"sampler: {sampler!r} does not run on a {schedule.kind} noise schedule; allowed: {able}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta}; allowed: 0 to 1")
    options: dict[str, Any] = {"karras": karras, "eta": eta}
    for name, value in options.items():
        if value and name not in entry.options:
            able = ", ".join(other for other, other_entry in SAMPLERS.items() if name in other_entry.options)
            raise ValueError(f"{name}: {value} has no meaning for sampler {sampler!r}; allowed: with {able}")
    if not 0 <= first < max(steps, 1):
        raise ValueError(f"first: {first}; allowed: 0 to {steps - 1}")
    full, init_scale = entry.rows(schedule, steps, spacing, **{name: options[name] for name in entry.options})
    restarted = full[first]._replace(b=full[first].b + full[first].c, c=0.0)
    rows = (restarted, *full[first + 1 :])
    return Plan(sampler, tuple(Row(*map(float, row)) for row in rows), float(init_scale), first)


def entry_row(rows: Sequence[Row], alpha: float) -> int:
    """Index of the last row whose input is at least as noisy as a latent of signal scale alpha; 0 if none is.

    A tolerance of SAME_LEVEL lets a latent whose alpha went through float32 find the row that it came from.
    """
    return max((i for i, row in enumerate(rows) if row.alpha <= alpha + SAME_LEVEL), default=0)


def renoise(alpha: float, noisier: float) -> tuple[float, float]:
    """(kept, fresh) of x <- kept*x + fresh*noise, which takes a latent of signal scale `alpha` to that of `noisier`.

    kept = noisier/alpha scales the signal; with noise of scale sqrt(1 - alpha^2) in x, the variance that is then
    missing is 1 - noisier^2 - kept^2 (1 - alpha^2) = 1 - kept^2. A latent at this level already stays as it is.
    """
    if noisier >= alpha - SAME_LEVEL:
        return 1.0, 0.0
    kept = noisier / alpha
    return kept, float((1 - kept**2) ** 0.5)


def _euler_grid(schedule: NoiseSchedule, steps: int, spacing: str, karras: bool) -> tuple[Array, Array]:
    """[steps] timesteps and [steps + 1] sigmas that end at 0. Karras spacing runs between the spacing's own ends."""
    timesteps = spaced_timesteps(schedule, steps, spacing, rounded=False)
    sigmas = schedule.sigmas_at(timesteps)
    if karras:
        sigmas = karras_sigmas(sigmas[0], sigmas[-1], np.linspace(0, 1, steps))
        timesteps = in_float32(schedule.timesteps_of(sigmas))
    return timesteps, in_float32(np.append(sigmas, 0.0))


def _euler_init_scale(spacing: str, noises: Array) -> float:
    """Euler schedulers start leading spacing from sqrt(sigma^2 + 1) of noise, the others from sigma."""
    return 1.0 if spacing == "leading" else float(noises[0])


def _dpm_grid(schedule: NoiseSchedule, steps: int, spacing: str, karras: bool) -> tuple[Array, Array]:
    """[steps] timesteps and [steps + 1] sigmas that end at 0. Karras spacing runs over the whole schedule."""
    timesteps = spaced_timesteps(schedule, steps, spacing, without_last=True)
    sigmas = schedule.sigmas_at(timesteps)
    if karras:
        sigmas = karras_sigmas(float(schedule.sigmas[-1]), float(schedule.sigmas[0]), np.linspace(0, 1, steps))
        timesteps = schedule.timesteps_of(sigmas)
        timesteps = np.floor(timesteps) if schedule.beta_schedule == "squaredcos_cap_v2" else np.round(timesteps)
    return timesteps, in_float32(np.append(sigmas, 0.0))


def _alphas_and_noises(sigmas: Array) -> tuple[Array, Array]:
    alphas = 1 / np.sqrt(1 + sigmas**2)
    return alphas, alphas * sigmas


def _half_inverse_r(sigmas: Array, i: int) -> float:
    """1 / 2r of DPM++'s row i, where lambda = -ln sigma; 0 makes the row first order."""
    if i == 0 or sigmas[i + 1] == 0:
        return 0.0
    return float(np.log(sigmas[i] / sigmas[i + 1]) / np.log(sigmas[i - 1] / sigmas[i]) / 2)
