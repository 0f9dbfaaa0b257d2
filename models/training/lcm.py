"""The few-step student, by latent consistency distillation (Luo et al. 2023)."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from models.training.checkpoints import Checkpoints
from models.training.compiled import Compiled
from models.training.distributed import Clock, Ranks
from models.training.flat import FlatOptimizer
from models.training.meter import Meter
from models.training.networks import build_unet, frozen
from models.training.ring import Ring
from models.training.sampling import (
    ORIGINAL_STEPS,
    STRIDE,
    FixedBatch,
    Velocity,
    consistency,
    guidance_embedding,
    lcm_timesteps,
)
from models.training.schedule import alphas_cumprod, from_velocity, noised, per_row
from models.training.settings import Preset

_HUBER = 1e-3
_MAX_OMEGA = 6.0  # guidance 1 to 7
_TARGET_RATE = 0.05
_FIRST_STEP_SHARE = 0.15  # one-step pictures start at the noisiest timestep, so it is drawn more often
_WARM_UP = 100
_DECAY_FROM = 0.4


class StudentLoss(nn.Module):
    """Pseudo-Huber distance between the student's consistency function and its target."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.velocity = Velocity(unet, dtype)

    def forward(
        self,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        states: torch.Tensor,
        guidance: torch.Tensor,
        alpha: torch.Tensor,
        target: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, detached loss); noisy and target [B, 4, h, h]."""
        ours = consistency(self.velocity(noisy, timestep, states, guidance), noisy, timestep, alpha)
        loss = (((ours - target).square() + _HUBER**2).sqrt() - _HUBER).mean()
        return loss, loss.detach()


def make_step(preset: Preset, ranks: Ranks, text_width: int) -> tuple[UNet2DConditionModel, FlatOptimizer, Compiled]:
    """The student, its optimiser, and its compiled forward-and-backward. Its guidance embedding starts silent."""
    torch.manual_seed(preset.seed + 6)
    unet = build_unet(preset, text_width, guided=True).to(ranks.device)
    optimizer = FlatOptimizer(unet, ranks, average=0.99)
    step = Compiled(StudentLoss(unet, ranks.dtype), "student", ranks, backward=True, clear=optimizer.clear)
    return unet, optimizer, step


def make_predictors(
    preset: Preset, ranks: Ranks, text_width: int
) -> tuple[UNet2DConditionModel, FixedBatch, UNet2DConditionModel, FixedBatch]:
    """(teacher, its velocity on pairs of batches, student, its velocity), both frozen in training precision."""
    batch = ranks.share(preset.unet_batch)
    out: list[Any] = []
    for guided, size, name in ((False, 2 * batch, "teacher inference"), (True, batch, "student inference")):
        unet = frozen(build_unet(preset, text_width, guided=guided), ranks.device, ranks.dtype)
        out += [unet, FixedBatch(Compiled(Velocity(unet, ranks.dtype), name, ranks), size)]
    return out[0], out[1], out[2], out[3]


def _start_from_teacher(optimizer: FlatOptimizer, student: UNet2DConditionModel, weights: dict[str, Any]) -> None:
    """Set the student's master weights to the teacher's, and its guidance projection to zero."""
    missing = student.load_state_dict(weights, strict=False).missing_keys
    if missing != ["time_embedding.cond_proj.weight"]:
        raise ValueError(f"the student lacks more than its guidance projection: {missing}")
    named = dict(zip((name for name, _ in student.named_parameters()), optimizer.views(optimizer.master), strict=True))
    for name, view in named.items():
        if name in weights:
            view.copy_(weights[name])
        else:
            view.zero_()
            student.get_parameter(name).data.zero_()
    optimizer.ema.copy_(optimizer.master)


class Lessons:
    """Batches for the student: where it is, and where the teacher's next step takes its averaged self."""

    def __init__(
        self, preset: Preset, ring: Ring, null: torch.Tensor, teacher: FixedBatch, target: FixedBatch, ranks: Ranks
    ) -> None:
        """`teacher` and `target`: velocities, the latter of the student's average."""
        self._preset, self._ring, self._ranks = preset, ring, ranks
        self._teacher, self._target = teacher, target
        self._batch = ranks.share(preset.unet_batch)
        self._nothing = null.expand(self._batch, -1, -1)
        self._alphas = alphas_cumprod(ranks.device)
        self._times = torch.tensor(lcm_timesteps(ORIGINAL_STEPS), device=ranks.device)

    def _positions(self) -> torch.Tensor:
        """Places in the distillation grid [B], noisiest first."""
        device = self._ranks.device
        index = torch.randint(0, ORIGINAL_STEPS, (self._batch,), device=device)
        return torch.where(torch.rand(self._batch, device=device) < _FIRST_STEP_SHARE, 0, index)

    @torch.no_grad()
    def draw(self) -> tuple[torch.Tensor, ...]:
        """The arguments of `StudentLoss.forward`. Luo et al. 2023, algorithm 1, with one DDIM step of the teacher."""
        latents, states = self._ring.draw(self._batch)
        now = self._times[self._positions()]
        after = (now - STRIDE).clamp(min=0)
        alpha, alpha_after = self._alphas[now], self._alphas[after]
        omega = torch.rand(self._batch, device=self._ranks.device) * _MAX_OMEGA
        guidance = guidance_embedding(omega, self._preset.guidance_width).to(self._ranks.dtype)
        noisy = noised(latents, torch.randn_like(latents), alpha)
        without, with_text = self._teacher(
            torch.cat([noisy, noisy]), torch.cat([now, now]), torch.cat([self._nothing, states])
        ).chunk(2)
        v = with_text + per_row(omega) * (with_text - without)
        denoised, noise = from_velocity(v, noisy, alpha)
        nearer = noised(denoised, noise, alpha_after)
        aim = consistency(self._target(nearer, after, states, guidance), nearer, after, alpha_after)
        return noisy, now, states, guidance, alpha, aim


def train_lcm(
    preset: Preset,
    ring: Ring,
    null: torch.Tensor,
    teacher_weights: dict[str, Any],
    ranks: Ranks,
    checkpoints: Checkpoints,
    seconds: float,
) -> dict[str, Any]:
    """Distil for `seconds`; the finished checkpoint holds the averaged float32 weights."""
    width = null.shape[-1]
    teacher, predict_teacher, target_net, predict_target = make_predictors(preset, ranks, width)
    teacher.load_state_dict(teacher_weights)
    student, optimizer, step = make_step(preset, ranks, width)
    _start_from_teacher(optimizer, student, teacher_weights)
    clock = Clock(ranks, checkpoints.resume("lcm", optimizer))
    target = (optimizer.ema if optimizer.iterations else optimizer.master).clone()
    optimizer.copy_to(target_net, target)
    torch.manual_seed(preset.seed + 2000 + 17 * optimizer.iterations + ranks.rank)
    lessons = Lessons(preset, ring, null, predict_teacher, predict_target, ranks)
    meter = Meter(clock, ranks.share(preset.unet_batch) * ranks.size)
    while meter.elapsed < seconds:
        fall = min(1.0, (1 - min(1.0, meter.elapsed / seconds)) / (1 - _DECAY_FROM))
        rate = preset.student_rate * min(1.0, (optimizer.iterations + 1) / min(_WARM_UP, 4 * preset.warm_up))
        rate *= max(0.01, fall)
        if meter.done % preset.refill_every == 0:
            ring.refill()
        _, value = step(*lessons.draw())
        optimizer.step(rate)
        target.lerp_(optimizer.master, _TARGET_RATE)
        optimizer.copy_to(target_net, target)
        meter.step(value[None])
        checkpoints.keep("lcm", optimizer, clock, meter.done)
        if meter.due(preset.log_every, (1, 20)):
            ranks.log(
                f"lcm {optimizer.iterations} loss {meter.means()[0]:.5f} rate {rate:.1e} "
                f"{meter.elapsed:.0f} s {meter.speed:.0f} pictures/s"
            )
    figures = meter.figures(optimizer.iterations, student)
    ranks.log("lcm:", figures)
    averaged = build_unet(preset, width, guided=True).to(ranks.device)
    optimizer.copy_to(averaged, optimizer.ema)
    checkpoints.save("lcm", {"weights": averaged.state_dict(), "figures": figures}, finished=True)
    return figures
