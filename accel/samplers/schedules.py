"""Noise schedules: how much signal is left at each training timestep, and which timesteps a sampler visits.

The figures are those that networks are trained with: diffusers computes them in float32, so they are computed in
float32 here too, digit for digit, and held in float64 for the plans built from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from accel.samplers.betas import BETA_SCHEDULES, betas_of, rescale_zero_snr_betas

Array = npt.NDArray[np.float64]
Scalar = TypeVar("Scalar", int, float, str)

SPACINGS = ("leading", "trailing", "linspace")
SMALLEST_ALPHA_CUMPROD = 2.0**-24  # stands in for zero terminal SNR where a sampler divides by alpha

# Configuration entries that change the noise process or every sampler, with the only values that the plans honour.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "thresholding": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-math.inf,),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The variance-preserving process of T training timesteps, 0 the cleanest.

    alphas_cumprod: [T] float64, alpha squared at each timestep; the last is 0 for zero terminal SNR.
    beta_schedule: one of BETA_SCHEDULES; DPM++ treats Karras timesteps of the cosine one differently.
    set_alpha_to_one: DDIM's last step goes to alpha 1; otherwise to the alpha of timestep 0.
    steps_offset: added to the timesteps of "leading" spacing.
    original_inference_steps, timestep_scaling: LCM's distillation grid and its boundary condition.
    """

    kind: ClassVar[str] = "discrete"

    alphas_cumprod: Array
    beta_schedule: str = "linear"
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        values = self.alphas_cumprod
        if values.ndim != 1 or len(values) < 2 or not (np.all(values >= 0) and np.all(values <= 1)):
            raise ValueError(f"alphas_cumprod: shape {values.shape}; allowed: at least 2 values from 0 to 1")
        if np.any(np.diff(values) >= 0):
            raise ValueError("alphas_cumprod: not strictly decreasing; allowed: noise that grows with the timestep")
        values.flags.writeable = False

    @classmethod
    def from_betas(
        cls,
        beta_schedule: str,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
        *,
        trained_betas: Sequence[float] | None = None,
        rescale_zero_snr: bool = False,
        **fields: Any,
    ) -> NoiseSchedule:
        """Build from the betas of the forward process; `fields` are those of the class."""
        if beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule: {beta_schedule!r} is unknown; allowed: {', '.join(BETA_SCHEDULES)}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"beta_start: {beta_start}; allowed: above 0, up to beta_end = {beta_end}, which is below 1"
            )
        if trained_betas is not None:
            betas = torch.tensor(trained_betas, dtype=torch.float32)
        else:
            betas = betas_of(beta_schedule, beta_start, beta_end, num_train_timesteps)
        if rescale_zero_snr:
            betas = rescale_zero_snr_betas(betas)
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0).double().numpy()
        return cls(alphas_cumprod, beta_schedule=beta_schedule, **fields)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers scheduler_config.json.

        What the entry says of the sampler (its class, order, Karras, spacing) is not read: the request names those.
        Clipping of x0 (clip_sample, clip_denoised) belongs to the denoiser.

        Raises:
            ValueError: an entry is missing, or asks for something that the plans cannot honour.
        """
        if config.get("_class_name") == "CMStochasticIterativeScheduler":
            return ConsistencySchedule.from_config(config)
        for name, allowed in _REQUIRED_VALUES.items():
            if name in config and config[name] not in allowed:
                choices = ", ".join(str(value) for value in allowed)
                raise ValueError(f"scheduler {name}: {config[name]!r} is not supported; allowed: {choices}")
        optional = ("set_alpha_to_one", "steps_offset", "original_inference_steps", "timestep_scaling")
        return NoiseSchedule.from_betas(
            _entry(config, "beta_schedule", str),
            _entry(config, "beta_start", float),
            _entry(config, "beta_end", float),
            _entry(config, "num_train_timesteps", int),
            trained_betas=config.get("trained_betas"),
            rescale_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
            **{name: config[name] for name in optional if config.get(name) is not None},
        )

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> npt.NDArray[np.float32]:
        """[T] noise-to-signal ratios, finite: zero terminal SNR is kept 2^-24 away, as Euler and DPM++ do."""
        alphas_cumprod = torch.tensor(self.alphas_cumprod, dtype=torch.float32)
        if alphas_cumprod[-1] == 0:
            alphas_cumprod[-1] = SMALLEST_ALPHA_CUMPROD
        # torch's square root, not NumPy's: they differ in the last digit.
        return np.asarray((((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy())

    def sigmas_at(self, timesteps: Array) -> Array:
        """Sigmas at fractional timesteps, linear in sigma between neighbours."""
        return np.interp(timesteps, np.arange(len(self)), self.sigmas)

    def timesteps_of(self, sigmas: Array) -> Array:
        """Fractional timesteps of sigmas, linear in log sigma between neighbours."""
        grid = np.log(self.sigmas)
        logs = np.log(sigmas)
        low = np.clip(np.searchsorted(grid, logs, side="right") - 1, 0, len(grid) - 2)
        weight = np.clip((grid[low] - logs) / (grid[low] - grid[low + 1]), 0, 1)
        return np.asarray((1 - weight) * low + weight * (low + 1), dtype=np.float64)

    def alpha_at(self, t: float) -> float:
        """Signal scale at a fractional timestep, linear in alpha between neighbours; clamped to the schedule's ends."""
        return float(np.interp(t, np.arange(len(self)), np.sqrt(self.alphas_cumprod)))

    def timestep_at(self, alpha: float) -> float:
        """The fractional timestep with this signal scale: the inverse of alpha_at."""
        return float(np.interp(alpha, np.sqrt(self.alphas_cumprod[::-1]), np.arange(len(self))[::-1]))


@dataclass(frozen=True, eq=False)
class ConsistencySchedule(NoiseSchedule):
    """The noise levels of consistency models: T sigmas from sigma_min to sigma_max, evenly spaced in sigma^(1/rho).

    Karras et al. 2022, equation 5; Song et al. 2023, section 6. The network's timestep is 250 ln(sigma).

    explicit_timesteps: indices to visit instead of an even spread when a plan has as many steps, in decreasing order
        and counted from sigma_max as diffusers' scheduler counts them: (22, 0) visits sigma_max, then sigma 22 of T.
    """

    kind: ClassVar[str] = "consistency"

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    explicit_timesteps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.explicit_timesteps
        falling = all(after < before for before, after in pairwise(steps))
        if not falling or any(not 0 <= step < len(self) for step in steps):
            raise ValueError(f"timesteps: {steps}; allowed: strictly decreasing indices from {len(self) - 1} to 0")

    @classmethod
    def create(
        cls,
        num_train_timesteps: int = 40,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        timesteps: Sequence[int] = (),
    ) -> ConsistencySchedule:
        """Build from the end points of the noise; `timesteps` are explicit_timesteps."""
        if num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps: {num_train_timesteps}; allowed: at least 2")
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min: {sigma_min}; allowed: above 0 and below sigma_max = {sigma_max}")
        sigmas = karras_sigmas(sigma_max, sigma_min, np.linspace(0, 1, num_train_timesteps), rho)
        return cls(
            1 / (1 + sigmas[::-1] ** 2),
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            sigma_data=sigma_data,
            rho=rho,
            explicit_timesteps=tuple(timesteps),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ConsistencySchedule:
        """Read the scheduler_config.json of a CMStochasticIterativeScheduler; ValueError as in the base class."""
        if config.get("s_noise", 1.0) != 1.0:
            raise ValueError(f"scheduler s_noise: {config['s_noise']!r} is not supported; allowed: 1.0")
        return cls.create(
            _entry(config, "num_train_timesteps", int),
            sigma_min=_entry(config, "sigma_min", float),
            sigma_max=_entry(config, "sigma_max", float),
            sigma_data=_entry(config, "sigma_data", float),
            rho=_entry(config, "rho", float),
        )

    @property
    def most_steps(self) -> int:
        return len(self)

    def sampling_sigmas(self, steps: int) -> Array:
        """[steps] decreasing sigmas: the explicit timesteps if there are as many, else an even spread of indices."""
        if not 1 <= steps <= self.most_steps:
            raise ValueError(f"steps: {steps}; allowed: 1 to {self.most_steps} for this consistency model")
        if steps == len(self.explicit_timesteps):
            indices = np.array(self.explicit_timesteps[::-1])
        else:
            indices = np.arange(steps) * (len(self) // steps)
        return karras_sigmas(self.sigma_max, self.sigma_min, indices / (len(self) - 1), self.rho)

    def timesteps_of(self, sigmas: Array) -> Array:
        return np.asarray(250 * np.log(sigmas), dtype=np.float64)

    def alpha_at(self, t: float) -> float:
        return 1 / math.hypot(1.0, math.exp(t / 250))

    def timestep_at(self, alpha: float) -> float:
        return 250 * math.log(math.sqrt(1 - alpha**2) / alpha)


@dataclass(frozen=True, eq=False)
class LatentConsistencySchedule(NoiseSchedule):
    """The noise levels of a consistency model whose network is that of a latent diffusion model.

    Noise levels are sigmas, as Karras et al. 2022 have them; the network's timestep is the fractional one at which the
    diffusion model's own schedule has that sigma.

    sigma_min: where the consistency function is the identity (epsilon in Song et al. 2023).
    searched: by number of steps, the time points that a search found best (Song et al. 2023, section 3).
    """

    kind: ClassVar[str] = "consistency"
    most_steps: ClassVar[int] = 50  # beyond it, neighbours are so close that a step only redraws what is there

    sigma_min: float = 0.03
    sigma_max: float = 80.0
    searched: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        lowest, highest = float(self.sigmas[0]), float(self.sigmas[-1])
        slack = 1e-3  # the ends come from a file, in decimals, and from another computation of the same betas
        if not lowest * (1 - slack) <= self.sigma_min < self.sigma_max <= highest * (1 + slack):
            raise ValueError(
                f"sigma_min: {self.sigma_min} and sigma_max: {self.sigma_max}; "
                f"allowed: from {lowest:.5g} to {highest:.5g}, the noise of the schedule, sigma_min below sigma_max"
            )
        for steps, sigmas in self.searched.items():
            falling = all(after < before for before, after in pairwise(sigmas))
            if len(sigmas) != steps or not falling or not self.sigma_min <= sigmas[-1] <= sigmas[0] <= self.sigma_max:
                raise ValueError(
                    f"sigmas for {steps} steps: {sigmas}; allowed: {steps} strictly decreasing ones from sigma_max = "
                    f"{self.sigma_max} to sigma_min = {self.sigma_min}"
                )

    @classmethod
    def on(
        cls, schedule: NoiseSchedule, sigma_min: float, sigma_max: float, searched: Mapping[int, tuple[float, ...]]
    ) -> LatentConsistencySchedule:
        """On the timesteps of a diffusion model's schedule. Raises ValueError for sigmas that it does not have."""
        shared = {entry.name: getattr(schedule, entry.name) for entry in fields(NoiseSchedule)}
        return cls(**shared, sigma_min=sigma_min, sigma_max=sigma_max, searched=searched)

    def sampling_sigmas(self, steps: int) -> Array:
        """[steps] decreasing sigmas: the searched ones, else Karras spacing, whose next would be sigma_min."""
        if not 1 <= steps <= self.most_steps:
            raise ValueError(f"steps: {steps}; allowed: 1 to {self.most_steps} for this consistency model")
        if steps in self.searched:
            return np.asarray(self.searched[steps], dtype=np.float64)
        return karras_sigmas(self.sigma_max, self.sigma_min, np.arange(steps) / steps)


def spaced_timesteps(
    schedule: NoiseSchedule, steps: int, spacing: str, *, rounded: bool = True, without_last: bool = False
) -> Array:
    """[steps] decreasing timesteps, spaced as in Lin et al. 2023, table 2.

    Args:
        rounded: "linspace" gives whole timesteps (DDIM, DPM++); Euler takes fractional ones, in float32.
        without_last: divide the range for one step more and leave out its cleanest timestep (DPM++).
    """
    total = len(schedule)
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: {spacing!r} is unknown; allowed: {', '.join(SPACINGS)}")
    count = steps + (without_last and spacing != "trailing")
    if not 1 <= steps <= count <= total:
        raise ValueError(f"steps: {steps}; allowed: 1 to {total - (count - steps)} with {spacing} spacing")
    if spacing == "leading":
        timesteps = np.arange(count)[::-1] * float(total // count) + schedule.steps_offset
    elif spacing == "trailing":
        # Cut to length: rounding makes arange one too long for some counts, whose last timestep would be -1.
        timesteps = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    else:
        timesteps = np.linspace(0, total - 1, count)[::-1]
        timesteps = np.round(timesteps) if rounded else in_float32(timesteps)
    if timesteps[0] > total - 1:
        raise ValueError(
            f"steps: {steps} with steps_offset {schedule.steps_offset} reaches timestep {timesteps[0]:.0f}; "
            f"allowed: fewer steps, up to timestep {total - 1}"
        )
    return np.asarray(timesteps[:steps], dtype=np.float64)


def karras_sigmas(sigma_max: float, sigma_min: float, ramp: Array, rho: float = 7.0) -> Array:
    """Noise levels at positions `ramp`, 0 for sigma_max and 1 for sigma_min. Karras et al. 2022, equation 5."""
    largest, smallest = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.asarray((largest + ramp * (smallest - largest)) ** rho, dtype=np.float64)


def in_float32(values: Array) -> Array:
    """Round to float32's digits, where schedulers keep a table in float32."""
    return values.astype(np.float32).astype(np.float64)


def _entry(config: Mapping[str, Any], name: str, kind: type[Scalar]) -> Scalar:
    value = config.get(name)
    accepted = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ValueError(f"scheduler {name}: {value!r}; allowed: a {kind.__name__}")
    return kind(value)
