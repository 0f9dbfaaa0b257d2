"""A teacher of the miniature's size with random weights, and a ring without scenes, for tests of the students."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from models.training.distributed import Ranks
from models.training.networks import LATENT_CHANNELS, build_unet
from models.training.settings import MINIATURE

PRESET = replace(
    MINIATURE, resolution=32, unet_widths=(16, 16, 16), unet_groups=4, unet_batch=8, lora_batch=8, log_every=1000
)
WIDTH, LENGTH = 16, 6
# Pictures so small are one token at the deepest level, whose self-attention has nothing to choose and no gradients.
UNTAUGHT = ("attn1.to_q", "attn1.to_k")
CPU = torch.device("cpu")


class Ticking:
    """A clock that moves on by a second a reading, so that budgets are numbers of steps on any machine."""

    def __init__(self, step: float = 1.0, readings: int | None = None) -> None:
        """With `readings`, the reading after that many raises InterruptedError."""
        self.step, self.left, self.seconds = step, readings, 0.0

    def __call__(self) -> float:
        if self.left is not None:
            if self.left == 0:
                raise InterruptedError
            self.left -= 1
        self.seconds += self.step
        return self.seconds


def ranks(clock: Ticking | None = None) -> Ranks:
    return Ranks(0, 1, CPU, 0.0, clock or Ticking())


def taught(lora: dict[str, torch.Tensor]) -> bool:
    """Whether every adapter that can learn has left the zero at which it started, and all are finite."""
    return all(
        bool(value.isfinite().all()) and (float(value.abs().max()) > 0 or any(part in key for part in UNTAUGHT))
        for key, value in lora.items()
    )


class FakeRing:
    """A few fixed latents, each with text states of its own."""

    def __init__(self, side: int = PRESET.latent, examples: int = 4) -> None:
        generator = torch.Generator().manual_seed(3)
        self.latents = torch.randn(examples, LATENT_CHANNELS, side, side, generator=generator)
        self.states = torch.randn(examples, LENGTH, WIDTH, generator=generator)
        self.refills = 0

    def refill(self) -> None:
        self.refills += 1

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(0, len(self.latents), (count,))
        return self.latents[rows], self.states[rows]


def teacher(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return build_unet(PRESET, WIDTH, guided=False).eval()


def null() -> torch.Tensor:
    return torch.zeros(1, LENGTH, WIDTH)


def weights(unet: UNet2DConditionModel) -> dict[str, Any]:
    return {name: value.clone() for name, value in unet.state_dict().items()}
