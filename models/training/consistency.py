"""Consistency models in latent space (Song et al. 2023), as LoRAs of the teacher.

x_ve = x0 + sigma z, f(x_ve, sigma) = c_skip x_ve + c_out F(c_in x_ve) with sigma_data = 1: with F = -v the teacher's
UNet is exactly such a network (see `edm_form`), so both students start as the teacher's one-step denoiser.

Distillation learns the teacher's guided trajectories. Training ("consistency tuning", Geng et al. 2024) starts from the
diffusion model's weights too, but no teacher speaks in its loss: what it learns comes from data alone, unguided.
"""

import math
from functools import cache
from typing import Any

import torch

from models.training.checkpoints import Checkpoints
from models.training.distributed import Ranks
from models.training.forms import edm_form
from models.training.ring import Ring
from models.training.sampling import FixedBatch, consistent, guided, predictor
from models.training.schedule import NoiseLevels, karras, per_row
from models.training.settings import Preset
from models.training.students import LoraStudent, by_picture, places

_AVERAGE = 0.995
_DISTILLATION_LEVELS = 40
_FIRST_LEVELS, _LAST_LEVELS = 10, 160
_DOUBLINGS = int(math.log2(_LAST_LEVELS / _FIRST_LEVELS))
# Song & Dhariwal 2023, section 3.5: log sigma ~ N(-1.1, 2), for data of standard deviation 0.5; ours have 1.
_LOG_MEAN, _LOG_STD = -1.1 + math.log(2), 2.0


class Distillation:
    """Lessons of consistency distillation (algorithm 2), with one guided Euler step of the teacher.

    `teacher` and `target`: velocities, the latter of the student's average.
    """

    def __init__(
        self,
        preset: Preset,
        ring: Ring,
        batch: int,
        null: torch.Tensor,
        teacher: FixedBatch,
        target: FixedBatch,
        ranks: Ranks,
    ) -> None:
        self._ring, self._batch, self._null, self._device = ring, batch, null, ranks.device
        self._teacher, self._target = teacher, target
        self._levels = NoiseLevels(ranks.device)
        self._grid = torch.tensor(karras(_DISTILLATION_LEVELS, self._levels.low), device=ranks.device)
        self._equal = torch.ones(batch, device=ranks.device)
        self._omega = self._equal * (preset.distilled_guidance - 1)

    @torch.no_grad()
    def draw(self, progress: float) -> tuple[torch.Tensor, ...]:
        """The arguments of `StudentLoss.forward`."""
        latents, states = self._ring.draw(self._batch)
        place = places(_DISTILLATION_LEVELS - 1, self._batch, self._device)
        far, near = self._grid[place], self._grid[place + 1]
        x = latents + per_row(far) * torch.randn_like(latents)
        timestep, denoiser = self._levels.timestep(far), edm_form(far, 0.0)
        v = guided(self._teacher, denoiser.seen(x), timestep, states, self._null, self._omega)
        nearer = x + per_row((near - far) / far) * (x - denoiser.value(v, x))
        form = edm_form(near, self._levels.low)
        target = consistent(self._target, form, nearer, self._levels.timestep(near), states)
        return x, timestep, states, target, self._equal, *edm_form(far, self._levels.low)


class Tuning:
    """Lessons of consistency training (algorithm 3) as improved by Song & Dhariwal 2023.

    x0 + sigma_far z learns what the student itself says at x0 + sigma_near z, with the same z. The grid grows finer by
    doublings, levels are drawn log-normally, and pairs weigh 1 / (sigma_far - sigma_near).

    `itself`: velocities of the student as it is, without gradients.
    """

    def __init__(self, ring: Ring, batch: int, itself: FixedBatch, ranks: Ranks) -> None:
        self._ring, self._batch, self._itself, self._device = ring, batch, itself, ranks.device
        self._levels = NoiseLevels(ranks.device)
        self._strata = torch.arange(batch, device=ranks.device)
        self._grid = cache(self._make_grid)

    def _make_grid(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` sigmas, falling, and the probability [count - 1] that a pair or one before it is drawn."""
        grid = torch.tensor(karras(count, self._levels.low), device=self._device)
        steps = torch.erf((grid.log() - _LOG_MEAN) / (_LOG_STD * math.sqrt(2)))
        shares = steps[:-1] - steps[1:]
        return grid, shares.cumsum(0) / shares.sum()

    @torch.no_grad()
    def draw(self, progress: float) -> tuple[torch.Tensor, ...]:
        """The arguments of `StudentLoss.forward`."""
        latents, states = self._ring.draw(self._batch)
        grid, cumulative = self._grid(_FIRST_LEVELS * 2 ** min(_DOUBLINGS, int(progress * (_DOUBLINGS + 1))))
        # Stratified: one pair in each of B equal shares of the distribution.
        uniform = (self._strata + torch.rand(self._batch, device=self._device)) / self._batch
        place = torch.searchsorted(cumulative, uniform).clamp(max=len(cumulative) - 1)
        far, near = grid[place], grid[place + 1]
        noise = torch.randn_like(latents)
        x, nearer = latents + per_row(far) * noise, latents + per_row(near) * noise
        form = edm_form(near, self._levels.low)
        target = consistent(self._itself, form, nearer, self._levels.timestep(near), states)
        return x, self._levels.timestep(far), states, target, 1 / (far - near), *edm_form(far, self._levels.low)


def train_consistency(
    preset: Preset,
    ring: Ring,
    null: torch.Tensor,
    teacher_weights: dict[str, Any],
    ranks: Ranks,
    checkpoints: Checkpoints,
    seconds: float,
) -> dict[str, Any]:
    """Distil `preset.distilled_guidance`; the finished checkpoint "consistency" holds the averaged LoRA.

    `null`: text states [1, LENGTH, width] of the empty prompt.
    """
    batch = ranks.share(preset.lora_batch)
    student = _student("consistency", preset, teacher_weights, null.shape[-1], ranks)
    target, adapters = student.twin()
    lessons = Distillation(
        preset,
        ring,
        batch,
        null,
        predictor(student.teacher(), "lora teacher inference", 2 * batch, ranks),
        predictor(target, "consistency inference", batch, ranks),
        ranks,
    )
    return student.train(ring, lessons, adapters, checkpoints, seconds)


def tune_consistency(
    preset: Preset,
    ring: Ring,
    null: torch.Tensor,
    teacher_weights: dict[str, Any],
    ranks: Ranks,
    checkpoints: Checkpoints,
    seconds: float,
) -> dict[str, Any]:
    """Train from the teacher's weights but without its word.

    The finished checkpoint "consistency-training" holds the averaged LoRA. Every row has its
    caption: without guidance there is no use for the empty prompt, of which only the width is read.
    """
    batch = ranks.share(preset.lora_batch)
    student = _student("consistency-training", preset, teacher_weights, null.shape[-1], ranks)
    lessons = Tuning(ring, batch, predictor(student.unet, "consistency inference", batch, ranks), ranks)
    return student.train(ring, lessons, None, checkpoints, seconds)


def _student(name: str, preset: Preset, teacher: dict[str, Any], text_width: int, ranks: Ranks) -> LoraStudent:
    return LoraStudent(
        name,
        preset,
        teacher,
        text_width,
        ranks,
        rank=preset.consistency_rank,
        distance=by_picture,
        average=_AVERAGE,
    )
