"""The autoencoder: trained on random scenes, then normalised so that its latents have unit variance."""

import math
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from models.training.checkpoints import Checkpoints
from models.training.compiled import Compiled
from models.training.distributed import Clock, Ranks
from models.training.flat import FlatOptimizer
from models.training.meter import Meter
from models.training.networks import LATENT_CHANNELS, build_vae, millions
from models.training.scenes import Stage
from models.training.settings import Preset

_KL_WEIGHT = 3e-4
_EDGE_WEIGHT = 0.5
_WARM_UP = 150
_CONTINUED = 0.4  # share of the learning rate for a VAE that has been trained before
_FIRST_LOG_VARIANCE = -6.0  # nearly noiseless latents at first: at 0 the decoder sees little but noise for long


class VaeLoss(nn.Module):
    """L1 + MSE + edges (L1 of finite differences) + a small KL, on pictures [B, 3, H, H] in [-1, 1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, [L1 + MSE, MSE, KL, log-variance])."""
        mean, log_variance = moments(self.vae, pictures)
        log_variance = log_variance.clamp(-14, 4)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        error = decode(self.vae, latents) - pictures
        across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
        edges = across.abs().mean() + down.abs().mean()
        mse = error.square().mean()
        pixels = error.abs().mean() + mse
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = pixels + _EDGE_WEIGHT * edges + _KL_WEIGHT * divergence
        return loss, torch.stack([pixels, mse, divergence, log_variance.mean()]).detach()


class VaeMoments(nn.Module):
    """`moments` as a module, for compiling."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return moments(self.vae, pictures)


def moments(vae: AutoencoderKL, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and log-variance, float32 [B, 4, h, h]."""
    pictures = pictures.to(vae.quant_conv.weight.dtype).contiguous(memory_format=torch.channels_last)
    mean, log_variance = vae.quant_conv(vae.encoder(pictures)).float().chunk(2, 1)
    return mean, log_variance


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pictures, float32 [B, 3, H, H], not clamped."""
    latents = latents.to(vae.quant_conv.weight.dtype).contiguous(memory_format=torch.channels_last)
    pictures: torch.Tensor = vae.decoder(vae.post_quant_conv(latents)).float()
    return pictures


def psnr(ours: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB per picture [B], of pictures in [-1, 1]."""
    return 10 * torch.log10(4 / (ours - truth).square().mean((1, 2, 3)).clamp(min=1e-10))


@torch.no_grad()
def normalise(vae: AutoencoderKL, stage: Stage, side: int, ranks: Ranks, batches: int = 4, batch: int = 64) -> None:
    """Fold per-channel mean and deviation of the latents into the 1x1 convolutions: latents become unit normal."""
    first, second = (torch.zeros(LATENT_CHANNELS, device=ranks.device) for _ in range(2))
    for _ in range(batches):
        mean, _log_variance = moments(vae, stage.compose(stage.sample(batch), side))
        first += mean.mean((0, 2, 3)) / batches
        second += mean.square().mean((0, 2, 3)) / batches
    centre, power = ranks.mean(first), ranks.mean(second)
    deviation = (power - centre.square()).sqrt()
    ranks.log("vae: latent mean", centre.tolist(), "deviation", deviation.tolist())
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:LATENT_CHANNELS] /= deviation[:, None, None, None]
    into.bias[:LATENT_CHANNELS] = (into.bias[:LATENT_CHANNELS] - centre) / deviation
    into.bias[LATENT_CHANNELS:] -= 2 * deviation.log()
    out.bias += (out.weight[:, :, 0, 0] * centre).sum(1)
    out.weight *= deviation[None, :, None, None]


@torch.no_grad()
def measure(
    vae: AutoencoderKL, stage: Stage, side: int, ranks: Ranks, batches: int = 4, batch: int = 32
) -> dict[str, float]:
    """PSNR on fresh scenes of `side` pixels: from the posterior's mean, a sample of it, and with noise on latents."""
    totals = torch.zeros(4, device=ranks.device)
    for _ in range(batches):
        pictures = stage.compose(stage.sample(batch), side)
        mean, log_variance = moments(vae, pictures)
        spread = (0.5 * log_variance).exp()
        noisy = mean + 0.1 * torch.randn_like(mean)
        sampled = mean + spread * torch.randn_like(mean)
        scores = [psnr(decode(vae, latents).clamp(-1, 1), pictures).mean() for latents in (mean, sampled, noisy)]
        totals += torch.stack([*scores, spread.mean()]) / batches
    names = ("psnr", "psnr_sampled", "psnr_latent_noise_0.1", "posterior_deviation")
    return dict(zip(names, ranks.mean(totals).tolist(), strict=True))


def train_vae(
    preset: Preset,
    stage: Stage,
    first: dict[str, Any] | None,
    ranks: Ranks,
    checkpoints: Checkpoints,
    seconds: float,
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Train for `seconds` (or load the finished result): the float32 VAE and its figures.

    `first`: weights to start from, of an earlier VAE; None starts from random ones.
    """
    torch.manual_seed(preset.seed + 7)
    vae = build_vae(preset).to(ranks.device)
    if first is None:
        _initialise(vae)
    else:
        vae.load_state_dict(first)
    done = checkpoints.finished("vae")
    if done is not None:
        vae.load_state_dict(done["weights"])
        return vae, done["figures"]
    ranks.log(f"vae: {millions(vae):.2f} M parameters, widths {preset.vae_widths}")
    optimizer = FlatOptimizer(vae, ranks, average=0.998)
    clock = Clock(ranks, checkpoints.resume("vae", optimizer))
    torch.manual_seed(preset.seed + 3000 + 17 * optimizer.iterations + ranks.rank)
    peak = preset.vae_rate * (1.0 if first is None else _CONTINUED)
    figures = _optimise(VaeLoss(vae), optimizer, peak, preset, stage, ranks, checkpoints, clock, seconds)
    averaged = build_vae(preset).to(ranks.device)
    optimizer.copy_to(averaged, optimizer.ema)
    normalise(averaged, stage, preset.resolution, ranks)
    figures |= measure(averaged, stage, preset.resolution, ranks)
    ranks.log("vae:", {name: round(value, 3) for name, value in figures.items()})
    checkpoints.save("vae", {"weights": averaged.state_dict(), "figures": figures}, finished=True)
    return averaged, figures


def _initialise(vae: AutoencoderKL) -> None:
    """Nearly noiseless latents, and residual blocks that start as the identity (SkipInit, De & Smith 2020)."""
    nn.init.constant_(vae.quant_conv.bias.data[LATENT_CHANNELS:], _FIRST_LOG_VARIANCE)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)


def _optimise(
    loss: VaeLoss,
    optimizer: FlatOptimizer,
    peak: float,
    preset: Preset,
    stage: Stage,
    ranks: Ranks,
    checkpoints: Checkpoints,
    clock: Clock,
    seconds: float,
) -> dict[str, Any]:
    """The training loop; returns its figures."""
    step = Compiled(loss, "vae", ranks, backward=True, clear=optimizer.clear, shared=False)
    batch = ranks.share(preset.vae_batch)
    meter = Meter(clock, batch * ranks.size, window=100)
    while meter.elapsed < seconds:
        rate = peak * min(1.0, (optimizer.iterations + 1) / _WARM_UP)
        rate *= max(0.01, 0.5 * (1 + math.cos(math.pi * min(1.0, meter.elapsed / seconds))))
        _, losses = step(stage.compose(stage.sample(batch), preset.resolution))
        norm = optimizer.step(rate)
        meter.step(losses)
        checkpoints.keep("vae", optimizer, clock, meter.done)
        if meter.due(preset.log_every, (1, 20, 100)):
            pixels, mse, divergence, spread = meter.means()
            ranks.log(
                f"vae {optimizer.iterations} L1+MSE {pixels:.4f} psnr~{10 * math.log10(4 / mse):.2f} "
                f"KL {divergence:.2f} logvar {spread:.2f} norm {float(norm):.2f} rate {rate:.1e} "
                f"{meter.speed:.0f} pictures/s"
            )
    return meter.figures(optimizer.iterations, loss.vae)
