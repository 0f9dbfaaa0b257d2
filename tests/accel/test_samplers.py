"""Plans against diffusers' schedulers, and the properties that every plan has."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from accel.kernels.sampler_step import sampler_step
from accel.samplers.betas import BETA_SCHEDULES
from accel.samplers.library import SAMPLERS, build_plan, entry_row, renoise
from accel.samplers.noise import INITIAL_ROW, gaussian
from accel.samplers.plans import Plan
from accel.samplers.schedules import SPACINGS, ConsistencySchedule, LatentConsistencySchedule, NoiseSchedule
from tests.accel.against_diffusers import (
    SHAPE,
    Case,
    cases,
    combinations,
    denoised,
    differences,
    run_plan_in_float64,
    toy_network,
)

# diffusers' Euler schedulers pass tensors to NumPy in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD = NoiseSchedule.from_betas("scaled_linear", 0.00085, 0.012, steps_offset=1, set_alpha_to_one=False)
ZERO_SNR = NoiseSchedule.from_betas("scaled_linear", 0.00085, 0.012, rescale_zero_snr=True)
CONSISTENCY = ConsistencySchedule.create()
LATENT = LatentConsistencySchedule.on(ZERO_SNR, 0.029167, 80.0, {2: (80.0, 1.5)})


@pytest.mark.parametrize(("sampler", "prediction", "spacing"), combinations())
def test_a_plan_draws_what_the_diffusers_scheduler_draws(sampler: str, prediction: str, spacing: str) -> None:
    for case in cases(sampler, prediction, spacing):
        found = differences(case)
        # The consistency scheduler ends with a whiff of noise: it squares sigma_min once in float32, once in float64.
        assert found.float64 <= (1e-5 if sampler == "consistency" else 1e-6), case
        assert found.our_rounding <= 1e-5, case
        # Euler subtracts numbers of 4096 to get one of 1 when it starts at zero SNR; in float32 that scheduler is off
        # by up to 8e-4 from itself in float64, and the plan, which has no such subtraction, is not.
        cancels = case.zero_snr and sampler.startswith("euler") and spacing != "leading"
        assert found.float32 <= (found.own_rounding + 1e-5 if cancels else 1e-4), case


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_timesteps_and_noise_levels_equal_the_schedulers_tables(beta_schedule: str, zero_snr: bool) -> None:
    for sampler in ("ddim", "euler", "euler_a", "dpmpp_2m", "lcm"):
        for spacing in SPACINGS:
            for steps in (1, 2, 3, 7, 20, 30, 50, 150):
                for karras in {False, "karras" in SAMPLERS[sampler].options}:
                    if sampler == "lcm" and steps > 50:
                        continue
                    case = Case(sampler, "v_prediction", spacing, steps, karras, zero_snr, beta_schedule=beta_schedule)
                    scheduler, rows = case.scheduler(), case.plan().rows
                    scheduler.set_timesteps(steps)
                    assert [row.t for row in rows] == scheduler.timesteps.tolist(), case
                    if hasattr(scheduler, "sigmas"):
                        alphas = 1 / np.sqrt(1 + scheduler.sigmas[:-1].double().numpy() ** 2)
                        assert [row.alpha for row in rows] == alphas.tolist(), case
                    else:
                        table = scheduler.alphas_cumprod.double()
                        assert [row.alpha for row in rows] == [table[int(row.t)].item() ** 0.5 for row in rows], case


@pytest.mark.parametrize("timesteps", [(22, 0), (39, 22, 0), (5, 0)])
def test_explicit_consistency_timesteps(timesteps: tuple[int, ...]) -> None:
    scheduler = Case("consistency", "consistency", "leading", 1).scheduler()
    scheduler.set_timesteps(timesteps=list(timesteps))
    schedule = ConsistencySchedule.create(timesteps=timesteps)
    plan = build_plan("consistency", schedule, len(timesteps), spacing="leading")
    assert [row.t for row in plan.rows] == pytest.approx(scheduler.timesteps.tolist(), rel=1e-12)
    sigmas = [math.sqrt(1 / row.alpha**2 - 1) for row in plan.rows]
    assert sigmas == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-6)
    assert len(build_plan("consistency", schedule, 4, spacing="leading")) == 4


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_latent_consistency_plan_keeps_the_variance(steps: int) -> None:
    """A perfect denoiser's x = alpha x0 + sqrt(1 - alpha^2) noise stays of that form, up to sigma_min's own noise."""
    plan = build_plan("consistency", LATENT, steps, spacing="trailing")
    assert plan.init_scale == pytest.approx(80 / math.hypot(1, 80))
    assert (np.diff([row.alpha for row in plan.rows]) > 0).all()
    assert (np.diff([row.t for row in plan.rows]) < 0).all()
    for row, after in zip(plan.rows, [row.alpha for row in plan.rows[1:]], strict=False):
        sigma = math.sqrt(1 / after**2 - 1)
        assert (row.a, row.b, row.c) == (0, pytest.approx(after), 0)
        assert row.s == pytest.approx(after * math.sqrt(sigma**2 - LATENT.sigma_min**2))
    assert plan.rows[-1][2:] == (0, 1, 0, 0)


@pytest.mark.parametrize("sampler", [*SAMPLERS, "latent consistency"])
def test_there_is_a_plan_of_the_most_steps_and_of_no_more(sampler: str) -> None:
    name = sampler.removeprefix("latent ")
    schedule = {"consistency": CONSISTENCY, "latent consistency": LATENT}.get(sampler, SD)
    most = SAMPLERS[name].most_steps(schedule)
    assert len(build_plan(name, schedule, most, spacing="trailing")) == most
    with pytest.raises(ValueError, match=f"allowed: 1 to {most}"):
        build_plan(name, schedule, most + 1, spacing="trailing")


def test_forty_staggered_pictures_in_batches_equal_their_solo_runs() -> None:
    """Exactly: a picture's bits do not depend on its neighbours."""
    plans = [_mixed_plan(i) for i in range(40)]
    solo = [_run_batched([plan], [seed], at_once=1)[0] for seed, plan in enumerate(plans)]
    together = _run_batched(plans, list(range(40)), at_once=8)
    for i, plan in enumerate(plans):
        assert torch.equal(together[i], solo[i]), (i, plan.sampler)
    for i, plan in enumerate(plans):
        if plan.sampler != "consistency":
            exact = run_plan_in_float64(plan, "v_prediction", i)
            assert (solo[i] - exact).abs().max() <= 1e-5 * exact.abs().max(), (i, plan.sampler)


def _mixed_plan(i: int) -> Plan:
    name = list(SAMPLERS)[i % 7]
    steps = (1, 3, 4, 9, 17, 26)[i % 6]
    schedule = CONSISTENCY if name == "consistency" else (SD, ZERO_SNR)[i % 2]
    eta = 0.5 if name == "ddim" else 0.0
    return build_plan(name, schedule, steps, spacing=SPACINGS[i % 3], eta=eta)


def _run_batched(plans: list[Plan], seeds: list[int], at_once: int) -> list[torch.Tensor]:
    """Run a pool of slots as an engine does: pictures join as others leave, each at its own row."""
    network = toy_network(torch.float32)
    x, previous = torch.full((2, at_once, *SHAPE), torch.nan)
    finite = torch.ones(at_once, dtype=torch.bool)
    waiting, running, finished = list(range(len(plans))), dict[int, list[int]](), dict[int, torch.Tensor]()
    while waiting or running:
        for slot in range(at_once):
            if slot not in running and waiting:
                job = waiting.pop(0)
                running[slot] = [job, 0]
                x[slot] = plans[job].init_scale * gaussian(torch.tensor([seeds[job]]), INITIAL_ROW, SHAPE)[0]
        slots = sorted(running, reverse=True)
        batch = [(running[slot][0], running[slot][1]) for slot in slots]
        rows = [plans[job].rows[index] for job, index in batch]
        estimates = [
            denoised(network, "v_prediction", x[slot : slot + 1], row.t, row.alpha)
            for slot, row in zip(slots, rows, strict=True)
        ]
        sampler_step(
            x,
            previous,
            torch.tensor(slots),
            torch.cat(estimates),
            torch.tensor([row[2:] for row in rows], dtype=torch.float32),
            torch.tensor([seeds[job] for job, _ in batch]),
            torch.tensor([index for _, index in batch]),
            finite,
        )
        for slot in slots:
            running[slot][1] += 1
            job, done = running[slot]
            if done == len(plans[job]):
                finished[job] = x[slot : slot + 1].clone()
                del running[slot]
    assert finite.all()
    return [finished[job] for job in range(len(plans))]


any_plan = st.fixed_dictionaries(
    {
        "sampler": st.sampled_from([name for name in SAMPLERS if name != "consistency"]),
        "schedule": st.sampled_from([SD, ZERO_SNR]),
        "steps": st.integers(1, 200),
        "spacing": st.sampled_from(SPACINGS),
        "karras": st.booleans(),
        "eta": st.sampled_from([0.0, 0.3, 1.0]),
    }
)


def _plan(options: dict[str, object], first: int = 0) -> Plan:
    takes = SAMPLERS[str(options["sampler"])].options
    chosen = {name: value for name, value in options.items() if name not in ("karras", "eta") or name in takes}
    return build_plan(**chosen, first=first)  # type: ignore[arg-type]


@settings(max_examples=150)
@given(any_plan)
def test_rows_are_finite_and_ever_cleaner_and_keep_the_variance(options: dict[str, object]) -> None:
    assume(options["sampler"] != "lcm" or int(str(options["steps"])) <= 50)
    plan = _plan(options)
    values = np.array(plan.rows)
    assert len(plan) == options["steps"]
    assert np.isfinite(values).all()
    assert (np.diff(values[:, 1]) > 0).all()
    assert (values[:, 5] >= 0).all()
    assert plan.rows[0].c == 0
    after = [*values[1:, 1], 1.0]
    if plan.sampler == "ddim":
        if options["spacing"] != "leading":
            return  # the scheduler's stride does not meet these spacings' next timestep
        schedule = options["schedule"]
        assert isinstance(schedule, NoiseSchedule)
        after[-1] = 1.0 if schedule.set_alpha_to_one else math.sqrt(schedule.alphas_cumprod[0])
    for row, alpha in zip(plan.rows, after, strict=True):
        # A perfect denoiser's x = alpha x0 + sqrt(1 - alpha^2) noise stays of that form, and ends on x0.
        assert row.a * row.alpha + row.b + row.c == pytest.approx(alpha, abs=1e-4)
        assert row.a**2 * (1 - row.alpha**2) + row.s**2 == pytest.approx(1 - alpha**2, abs=1e-4)


@settings(max_examples=150)
@given(any_plan, st.data())
def test_a_plan_entered_late_is_the_full_plan_without_its_history(
    options: dict[str, object], data: st.DataObject
) -> None:
    assume(options["sampler"] != "lcm" or int(str(options["steps"])) <= 50)
    full = _plan(options)
    first = data.draw(st.integers(0, len(full) - 1))
    late = _plan(options, first)
    assert late.first == first
    assert late.rows[1:] == full.rows[first + 1 :]
    entered, met = late.rows[0], full.rows[first]
    assert entered == met._replace(b=met.b + met.c, c=0.0)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_the_restarted_row_is_the_first_order_update(sampler: str) -> None:
    """First-order DPM++ is DDIM (eta 0), and its SDE form is ancestral Euler, at the same noise levels."""
    row = build_plan(sampler, SD, 20, spacing="trailing", first=7).rows[0]
    alpha = build_plan(sampler, SD, 20, spacing="trailing").rows[8].alpha
    noise, noise_after = math.sqrt(1 - row.alpha**2), math.sqrt(1 - alpha**2)
    if sampler == "dpmpp_2m":
        assert row.a == pytest.approx(noise_after / noise)
        assert row.b == pytest.approx(alpha - row.alpha * noise_after / noise)
    else:
        ratio = (noise_after / alpha) / (noise / row.alpha)
        assert row.a == pytest.approx(noise_after / noise * ratio)
        assert row.b == pytest.approx(alpha * (1 - ratio**2))
        assert row.s == pytest.approx(noise_after * math.sqrt(1 - ratio**2))


def test_consistency_rows() -> None:
    for steps in (1, 2, 18, 40):
        plan = build_plan("consistency", CONSISTENCY, steps, spacing="leading")
        assert np.isfinite(np.array(plan.rows)).all()
        assert (np.diff([row.alpha for row in plan.rows]) > 0).all()
        assert plan.rows[-1][2:] == (0.0, 1.0, 0.0, 0.0)
        assert plan.init_scale == pytest.approx(80 / math.hypot(1, 80))


def test_zero_terminal_snr_starts_from_pure_noise() -> None:
    assert build_plan("ddim", ZERO_SNR, 25, spacing="trailing").rows[0].alpha == 0
    assert build_plan("lcm", ZERO_SNR, 4, spacing="leading").rows[0].alpha == 0
    assert build_plan("euler", ZERO_SNR, 25, spacing="trailing").rows[0].alpha == pytest.approx(2**-12, rel=1e-6)


def test_entry_row() -> None:
    rows = build_plan("euler", SD, 25, spacing="leading").rows
    for i, row in enumerate(rows):
        assert entry_row(rows, row.alpha) == i
        assert entry_row(rows, float(np.float32(row.alpha))) == i
    assert entry_row(rows, 0.0) == 0
    assert entry_row(rows, (rows[3].alpha + rows[4].alpha) / 2) == 3
    assert entry_row(rows, 1.0) == 24
    taken = build_plan("dpmpp_2m", SD, 50, spacing="leading").rows[20].alpha
    entry = entry_row(rows, taken)
    assert rows[entry].alpha <= taken < rows[entry + 1].alpha


def test_a_renoised_latent_has_the_mean_and_the_variance_of_its_new_level() -> None:
    x0, generator = 3.0, torch.Generator().manual_seed(0)
    alpha, noisier = 0.8, 0.3
    first, second = torch.randn(2, 1_000_000, generator=generator, dtype=torch.float64)
    kept, fresh = renoise(alpha, noisier)
    x = kept * (alpha * x0 + (1 - alpha**2) ** 0.5 * first) + fresh * second
    assert float(x.mean()) == pytest.approx(noisier * x0, abs=0.005)
    assert float(x.var()) == pytest.approx(1 - noisier**2, rel=0.005)
    assert renoise(alpha, alpha) == renoise(alpha, float(np.float32(alpha))) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "heun"}, r"sampler: 'heun'.*allowed: ddim, euler"),
        ({"sampler": "consistency"}, r"sampler: 'consistency'.*discrete.*allowed: ddim"),
        ({"schedule": CONSISTENCY}, r"sampler: 'euler'.*consistency.*allowed: consistency"),
        ({"spacing": "cosine"}, r"spacing: 'cosine'.*allowed: leading, trailing, linspace"),
        ({"steps": 0}, r"steps: 0; allowed: 1 to 1000"),
        ({"steps": -3}, r"steps: -3; allowed: 1 to 1000"),
        ({"steps": 1001}, r"steps: 1001; allowed: 1 to 1000"),
        ({"steps": 1000}, r"steps: 1000 with steps_offset 1 reaches timestep 1000"),
        ({"sampler": "dpmpp_2m", "steps": 1000}, r"steps: 1000; allowed: 1 to 999"),
        ({"sampler": "lcm", "steps": 51}, r"steps: 51; allowed: 1 to 50"),
        ({"sampler": "lcm", "steps": 0}, r"steps: 0; allowed: 1 to 50"),
        ({"sampler": "consistency", "schedule": CONSISTENCY, "steps": 41}, r"steps: 41; allowed: 1 to 40"),
        ({"eta": 0.5}, r"eta: 0.5.*'euler'.*allowed: with ddim"),
        ({"sampler": "ddim", "eta": 1.5}, r"eta: 1.5; allowed: 0 to 1"),
        ({"sampler": "ddim", "karras": True}, r"karras: True.*'ddim'.*allowed: with euler, dpmpp_2m, dpmpp_2m_sde"),
        ({"first": 10}, r"first: 10; allowed: 0 to 9"),
        ({"first": -1}, r"first: -1; allowed: 0 to 9"),
    ],
)
def test_what_cannot_be_planned_is_said(change: dict[str, object], message: str) -> None:
    options = {"sampler": "euler", "schedule": SD, "steps": 10, "spacing": "leading"} | change
    with pytest.raises(ValueError, match=message):
        build_plan(**options)  # type: ignore[arg-type]


def test_lcm_timesteps_do_not_depend_on_spacing() -> None:
    leading = build_plan("lcm", SD, 4, spacing="leading")
    assert all(build_plan("lcm", SD, 4, spacing=spacing).rows == leading.rows for spacing in SPACINGS)
    assert [row.t for row in leading.rows] == [999, 759, 499, 259]
    finer = replace(SD, original_inference_steps=100)
    assert len(build_plan("lcm", finer, 100, spacing="leading")) == 100
