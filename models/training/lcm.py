"""Few-step students by latent consistency distillation: the LCM (Luo et al. 2023) and the LCM-LoRA (Luo et al. 2023b).

Both learn the same lessons. The LCM is a UNet of its own which reads the guidance scale; the LCM-LoRA is a small
adapter of the teacher with one guidance scale distilled in.
"""

from typing import Any

import torch

from models.training.checkpoints import Checkpoints
from models.training.compiled import Compiled
from models.training.distributed import Ranks
from models.training.flat import FlatOptimizer
from models.training.forms import lcm_form
from models.training.networks import build_unet, frozen
from models.training.ring import Ring
from models.training.sampling import (
    ORIGINAL_STEPS,
    STRIDE,
    FixedBatch,
    consistent,
    guidance_embedding,
    guided,
    lcm_timesteps,
    predictor,
)
from models.training.schedule import alphas_cumprod, from_velocity, noised
from models.training.settings import Preset
from models.training.students import Course, LoraStudent, Student, StudentLoss, by_element, places, train

_MAX_OMEGA = 6.0  # guidance 1 to 7


class Lessons:
    """Batches for a student: where it is, and where the teacher's next step takes its averaged self.

    `teacher` and `target`: velocities, the latter of the student's average. `scale`: the guidance to distil in; None:
    random scales, embedded for a student that reads them.
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
        scale: float | None = None,
    ) -> None:
        self._ring, self._batch, self._null, self._ranks = ring, batch, null, ranks
        self._teacher, self._target = teacher, target
        self._scale, self._width = scale, preset.guidance_width
        self._alphas = alphas_cumprod(ranks.device)
        self._times = torch.tensor(lcm_timesteps(ORIGINAL_STEPS), device=ranks.device)
        self._equal = torch.ones(batch, device=ranks.device)

    def _guidance(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """omega [B], which is scale - 1, and the embedding, if the student takes one."""
        if self._scale is not None:
            return self._equal * (self._scale - 1), ()
        omega = torch.rand(self._batch, device=self._ranks.device) * _MAX_OMEGA
        return omega, (guidance_embedding(omega, self._width).to(self._ranks.dtype),)

    @torch.no_grad()
    def draw(self, progress: float) -> tuple[torch.Tensor, ...]:
        """The arguments of `StudentLoss.forward`. Luo et al. 2023, algorithm 1, with one DDIM step of the teacher."""
        latents, states = self._ring.draw(self._batch)
        now = self._times[places(ORIGINAL_STEPS, self._batch, self._ranks.device)]
        after = (now - STRIDE).clamp(min=0)
        alpha, alpha_after = self._alphas[now], self._alphas[after]
        omega, embedding = self._guidance()
        noisy = noised(latents, torch.randn_like(latents), alpha)
        v = guided(self._teacher, noisy, now.float(), states, self._null, omega)
        denoised, noise = from_velocity(v, noisy, alpha)
        nearer = noised(denoised, noise, alpha_after)
        form = lcm_form(after.float(), alpha_after)
        target = consistent(self._target, form, nearer, after.float(), states, *embedding)
        return noisy, now.float(), states, target, self._equal, *lcm_form(now.float(), alpha), *embedding


def train_lcm(
    preset: Preset,
    ring: Ring,
    null: torch.Tensor,
    teacher_weights: dict[str, Any],
    ranks: Ranks,
    checkpoints: Checkpoints,
    seconds: float,
    large: Ring | None = None,
) -> dict[str, Any]:
    """Distil for `seconds`; the finished checkpoint "lcm" holds the averaged float32 weights.

    `null`: text states [1, LENGTH, width] of the empty prompt. `large`: pictures of twice the side; every
    `preset.large_every`-th step learns from a quarter of the batch of them as well.
    """
    width, batch = null.shape[-1], ranks.share(preset.unet_batch)
    teacher = frozen(build_unet(preset, width, guided=False), ranks.device, ranks.dtype)
    teacher.load_state_dict(teacher_weights)
    target = frozen(build_unet(preset, width, guided=True), ranks.device, ranks.dtype)
    torch.manual_seed(preset.seed + 6)
    unet = build_unet(preset, width, guided=True).to(ranks.device)
    optimizer = FlatOptimizer(unet, ranks, average=0.99)
    optimizer.start_from(unet, teacher_weights)  # the guidance embedding starts silent
    loss = StudentLoss(unet, ranks.dtype, by_element)

    def course(ring: Ring, batch: int, size: str) -> Course:
        predict_teacher = predictor(teacher, f"{size}teacher inference", 2 * batch, ranks)
        predict_target = predictor(target, f"{size}student inference", batch, ranks)
        lessons = Lessons(preset, ring, batch, null, predict_teacher, predict_target, ranks)
        step = Compiled(loss, f"{size}student", ranks, backward=True, clear=optimizer.clear)
        return Course(ring, preset.refill_every, lessons, step)

    courses = [course(ring, batch, "")]
    if large is not None:
        courses.append(course(large, max(1, batch // 4), "large "))
    student = Student("lcm", unet, optimizer, target, courses, preset.student_rate, preset.unet_batch)
    figures = train(student, preset, ranks, checkpoints, seconds)
    averaged = build_unet(preset, width, guided=True).to(ranks.device)
    optimizer.copy_to(averaged, optimizer.ema)
    checkpoints.save("lcm", {"weights": averaged.state_dict(), "figures": figures}, finished=True)
    return figures


def train_lcm_lora(
    preset: Preset,
    ring: Ring,
    null: torch.Tensor,
    teacher_weights: dict[str, Any],
    ranks: Ranks,
    checkpoints: Checkpoints,
    seconds: float,
) -> dict[str, Any]:
    """Distil `preset.distilled_guidance` for `seconds`; the finished checkpoint "lcm-lora" holds the averaged LoRA."""
    width, batch = null.shape[-1], ranks.share(preset.lora_batch)
    student = LoraStudent(
        "lcm-lora", preset, teacher_weights, width, ranks, rank=preset.lora_rank, distance=by_element, average=0.99
    )
    target, adapters = student.twin()
    lessons = Lessons(
        preset,
        ring,
        batch,
        null,
        predictor(student.teacher(), "lora teacher inference", 2 * batch, ranks),
        predictor(target, "lora inference", batch, ranks),
        ranks,
        scale=preset.distilled_guidance,
    )
    return student.train(ring, lessons, adapters, checkpoints, seconds)
