"""A ring of latents and text states, refilled as training goes, so that composing and encoding cost little."""

import torch

from models.training.captions import CaptionWriter
from models.training.compiled import Compiled
from models.training.networks import LATENT_CHANNELS
from models.training.scenes import Stage
from models.training.settings import Preset
from models.training.text import LENGTH, TextTower


class Ring:
    """Holds `preset.ring` examples on the device; old ones are overwritten by fresh scenes.

    `scale` 2 makes pictures of twice the side: a quarter as many, a quarter at a time, so that they cost the same.
    """

    def __init__(
        self,
        preset: Preset,
        stage: Stage,
        writer: CaptionWriter,
        tower: TextTower,
        encode: Compiled,
        dtype: torch.dtype,
        scale: int = 1,
    ) -> None:
        self._stage, self._writer, self._tower, self._encode = stage, writer, tower, encode
        self._side = scale * preset.resolution
        self._refill = max(1, preset.refill // scale**2)
        side, size, start = scale * preset.latent, preset.ring // scale**2, preset.ring_start // scale**2
        self._latents = torch.empty(size, LATENT_CHANNELS, side, side, dtype=dtype, device=stage.device)
        self._states = torch.empty(size, LENGTH, tower.width, dtype=dtype, device=stage.device)
        self._next = self._filled = 0
        while self._filled < start:
            self.refill()

    @torch.no_grad()
    def refill(self) -> None:
        """Compose, caption and encode the next few scenes."""
        count = self._refill
        scenes = self._stage.sample(count)
        mean, log_variance = self._encode(self._stage.compose(scenes, self._side))
        start = self._next if self._next + count <= len(self._latents) else 0
        self._latents[start : start + count] = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        self._states[start : start + count] = self._tower.encode(self._writer.write(scenes))
        self._next = start + count
        self._filled = max(self._filled, self._next)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random latents, float32 [B, 4, h, h], and text states [B, LENGTH, width]."""
        rows = torch.randint(0, self._filled, (count,), device=self._latents.device)
        return self._latents[rows].float(), self._states[rows]
