"""The teacher: a v-prediction text-to-image UNet with classifier-free guidance (Ho & Salimans 2022)."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from models.training.checkpoints import Checkpoints
from models.training.compiled import Compiled
from models.training.distributed import Clock, Ranks
from models.training.flat import FlatOptimizer
from models.training.meter import Meter
from models.training.networks import build_unet, millions
from models.training.ring import Ring
from models.training.schedule import STEPS, alphas_cumprod, noised, velocity
from models.training.settings import Preset

_NO_CAPTION = 0.1
_DECAY_FROM = 0.55  # share of the time after which the learning rate falls to zero
_LARGE_FROM = 0.6  # share of the time after which some steps are on large pictures


class TeacherLoss(nn.Module):
    """Mean squared error of the predicted velocity."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = dtype

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timestep: torch.Tensor,
        states: torch.Tensor,
        alpha: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, loss of each row [B]); latents and noise [B, 4, h, h], timestep and alpha [B], states [B, L, D]."""
        noisy = noised(latents, noise, alpha).to(self.dtype).contiguous(memory_format=torch.channels_last)
        output = self.unet(noisy, timestep, states, return_dict=False)[0].float()
        rows = (output - velocity(latents, noise, alpha)).square().mean((1, 2, 3))
        return rows.mean(), rows.detach()


def make_steps(
    preset: Preset, ranks: Ranks, text_width: int
) -> tuple[UNet2DConditionModel, FlatOptimizer, Compiled, Compiled]:
    """The teacher, its optimiser, and its compiled forward-and-backward on usual and on large pictures."""
    torch.manual_seed(preset.seed + 5)
    unet = build_unet(preset, text_width, guided=False).to(ranks.device)
    optimizer = FlatOptimizer(unet, ranks, decay=0.01, average=0.999, muon=True)
    loss = TeacherLoss(unet, ranks.dtype)
    usual, large = (
        Compiled(loss, name, ranks, backward=True, clear=optimizer.clear) for name in ("teacher", "large teacher")
    )
    return unet, optimizer, usual, large


def learning_rate(peak: float, step: int, warm_up: int, progress: float) -> float:
    """Linear warm-up over steps, a plateau, then a linear fall to zero over time."""
    fall = min(1.0, (1 - min(1.0, progress)) / (1 - _DECAY_FROM))
    return peak * min(1.0, (step + 1) / warm_up) * max(0.002, fall)


class TeacherBatches:
    """The arguments of `TeacherLoss.forward`, drawn from a ring of examples."""

    def __init__(self, ring: Ring, batch: int, null: torch.Tensor, ranks: Ranks) -> None:
        self._ring, self._batch, self._null, self._device = ring, batch, null, ranks.device
        self._alphas = alphas_cumprod(ranks.device)
        self._strata = torch.arange(batch, device=ranks.device)
        self._drawn = 0

    def draw(self, refill_every: int) -> tuple[torch.Tensor, ...]:
        """Stratified timesteps: one in each of `batch` equal intervals. Every few draws the ring is refilled."""
        if self._drawn % refill_every == 0:
            self._ring.refill()
        self._drawn += 1
        latents, states = self._ring.draw(self._batch)
        dropped = torch.rand(self._batch, device=self._device) < _NO_CAPTION
        states = torch.where(dropped[:, None, None], self._null, states)
        place = (self._strata + torch.rand(self._batch, device=self._device)) * (STEPS / self._batch)
        timestep = place.long().clamp(max=STEPS - 1)
        return latents, torch.randn_like(latents), timestep, states, self._alphas[timestep]


def train_teacher(
    preset: Preset,
    ring: Ring,
    large_ring: Ring,
    null: torch.Tensor,
    first: dict[str, Any] | None,
    ranks: Ranks,
    checkpoints: Checkpoints,
    seconds: float,
) -> dict[str, Any]:
    """Train for `seconds`; the finished checkpoint holds the averaged float32 weights.

    Args:
        large_ring: pictures of twice the side, for one in `preset.large_every` of the later steps.
        null: text states [1, LENGTH, width] of the empty prompt.
        first: weights to start from, of an earlier teacher; None starts from random ones.
    """
    unet, optimizer, usual, large = make_steps(preset, ranks, null.shape[-1])
    if first is not None:
        optimizer.start_from(unet, first)
        ranks.log("teacher: starts from given weights")
    ranks.log(f"teacher: {millions(unet):.2f} M parameters, batch {preset.unet_batch}")
    clock = Clock(ranks, checkpoints.resume("teacher", optimizer))
    torch.manual_seed(preset.seed + 1000 + 17 * optimizer.iterations + ranks.rank)
    batch = ranks.share(preset.unet_batch)
    batches = TeacherBatches(ring, batch, null, ranks)
    large_batches = TeacherBatches(large_ring, max(1, batch // 4), null, ranks)
    meter = Meter(clock, batch * ranks.size)
    large(*large_batches.draw(preset.refill_every))  # compiles now, so that it costs no training time later
    optimizer.clear()
    while meter.elapsed < seconds:
        progress = meter.elapsed / seconds
        rate = learning_rate(preset.teacher_rate, optimizer.iterations, preset.warm_up, progress)
        is_large = progress > _LARGE_FROM and meter.done % preset.large_every == 0
        step, source = (large, large_batches) if is_large else (usual, batches)
        loss, rows = step(*source.draw(preset.refill_every))
        norm = optimizer.step(rate)
        meter.step(loss[None])
        checkpoints.keep("teacher", optimizer, clock, meter.done)
        if meter.due(2 * preset.log_every, (1, 20, 100)):
            quarters = [round(part.mean().item(), 3) for part in rows.chunk(4)]
            ranks.log(
                f"teacher {optimizer.iterations} loss {meter.means()[0]:.4f} by t {quarters} "
                f"norm {float(norm):.2f} rate {rate:.1e} {meter.elapsed:.0f} s {meter.speed:.0f} pictures/s"
            )
    figures = meter.figures(optimizer.iterations, unet)
    ranks.log("teacher:", figures)
    averaged = build_unet(preset, null.shape[-1], guided=False).to(ranks.device)
    optimizer.copy_to(averaged, optimizer.ema)
    checkpoints.save("teacher", {"weights": averaged.state_dict(), "figures": figures}, finished=True)
    return figures
