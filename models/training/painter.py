"""Pictures by the networks of a run: sheets to look at, and the search of consistency models' time points."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from models.scorer import Scorer
from models.training.distributed import Ranks
from models.training.lora import merge
from models.training.networks import build_unet, frozen
from models.training.prompts import SHEET_PROMPTS
from models.training.sampling import FixedBatch, Velocity, sample_consistency, sample_ddim, sample_lcm
from models.training.schedule import NoiseLevels
from models.training.settings import Preset
from models.training.sheets import save_sheet
from models.training.text import TextTower
from models.training.timepoints import STEPS, search
from models.training.vae import decode

_SEED = 1


class Painter:
    """Draws with the finished networks, eagerly: it is asked for few pictures.

    `weights`: float32 weights by stage, of UNets ("teacher", "lcm") or of LoRAs of the teacher.
    """

    def __init__(
        self,
        preset: Preset,
        ranks: Ranks,
        tower: TextTower,
        vae: AutoencoderKL,
        weights: Callable[[str], Mapping[str, Any]],
    ) -> None:
        self._preset, self._ranks, self._tower, self._vae, self._weights = preset, ranks, tower, vae, weights

    def _predictor(self, stage: str) -> FixedBatch:
        weights = dict(self._weights(stage))
        if stage not in ("teacher", "lcm"):
            weights = merge(dict(self._weights("teacher")), weights)
        unet = build_unet(self._preset, self._tower.width, guided=stage == "lcm")
        unet.load_state_dict(weights)
        unet = frozen(unet, self._ranks.device, self._ranks.dtype)
        return FixedBatch(Velocity(unet, self._ranks.dtype), self._preset.unet_batch)

    @torch.no_grad()
    def _pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Decoded and clamped [B, 3, H, H]."""
        return torch.cat([decode(self._vae, part).clamp(-1, 1) for part in latents.split(64)])

    def draw_sheets(self, folder: Path) -> None:
        """The same prompts with the same seeds: by the teacher in two sizes, and by LCM and LCM-LoRA in a few steps."""
        preset, ranks, side = self._preset, self._ranks, self._preset.latent
        states, guidance = self._tower.encode_prompts(SHEET_PROMPTS[: preset.shown]), preset.distilled_guidance
        null, teacher = self._tower.encode_prompts([""]), self._predictor("teacher")
        for scale, name in ((1, "ddim-50"), (2, "large-ddim-50")):
            latents = sample_ddim(teacher, states, null, scale * side, ranks, guidance=guidance, seed=_SEED)
            save_sheet(self._pictures(latents), folder / f"{name}.webp")
        for stage, given in (("lcm", guidance), ("lcm-lora", None)):
            predict = self._predictor(stage)
            for steps in STEPS:
                latents = sample_lcm(
                    predict, states, side, ranks, guidance=given, guidance_width=preset.guidance_width, seed=_SEED,
                    steps=steps,
                )  # fmt: skip
                save_sheet(self._pictures(latents), folder / f"{stage}-{steps}.webp")

    def time_points(self, stage: str, scorer: Scorer, prompts: Sequence[str]) -> dict[str, list[float]]:
        """Sigmas of consistency sampling by number of steps: those at which the scorer likes the pictures best."""
        predict, states = self._predictor(stage), self._tower.encode_prompts(prompts)
        wanted = scorer.embed_text(prompts)

        def quality(sigmas: Sequence[float]) -> float:
            latents = sample_consistency(predict, states, self._preset.latent, self._ranks, sigmas=sigmas, seed=_SEED)
            return float((scorer.read(self._pictures(latents)).embedding * wanted).sum(1).mean())

        low = NoiseLevels(self._ranks.device).low
        return {str(steps): search(quality, low, steps) for steps in STEPS}
