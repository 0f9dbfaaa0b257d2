"""What the benchmarks that draw share: prompts, a model that is a network alone, and drawing so many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from accel.samplers.schedules import NoiseSchedule
from models.diffusion.denoiser import TextDenoiser
from models.diffusion.model import Condition, ModelCard, SamplerDefaults, TextStates
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import Completed, Image, ImageRequest
from service.events import Failed

PROMPTS = [
    "a red apple on a blue background",
    "3d fox on a green background",
    "two flat cats on a yellow background",
    "a rocket on a navy to purple gradient",
    "small 3d pizza on a white background",
    "flat robot and tree on a mint background",
    "an owl on a brown background",
    "three 3d crowns on an orange background",
]


class BareModel:
    """A `DiffusionModel` whose denoiser is the real one around a network: prompts are not read, and decoding is next to
    nothing.

    Args:
        network: as a UNet of diffusers is called, with its `config`, `device` and `dtype`.
        side: of its latents, [4, side, side].
        guided: every row has a negative branch.
    """

    def __init__(self, network: Any, side: int, samplers: Mapping[str, SamplerDefaults], *, guided: bool) -> None:
        self.device, self.dtype = network.device, network.dtype
        self._denoiser = TextDenoiser(network, "epsilon")
        self._guided = guided
        self.card = ModelCard(
            name="bare",
            kind="sd",
            source="",
            revision="",
            default_size=(8 * side, 8 * side),
            size_multiple=8,
            latent_channels=4,
            scale=8,
            max_prompt_tokens=77,
            num_classes=None,
            default_sampler="ddim",
            samplers=samplers,
        )
        self._schedule = NoiseSchedule.from_config(
            {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        )

    def denoiser(self, sampler: str, loras: Sequence[tuple[str, float]] = ()) -> TextDenoiser:
        return self._denoiser

    def schedule(self, sampler: str, loras: Sequence[tuple[str, float]] = ()) -> NoiseSchedule:
        return self._schedule

    def encode(
        self,
        prompts: Sequence[tuple[str, str]],
        guidance_scales: Sequence[float],
        sampler: str,
        size: tuple[int, int],
        owner: str = "",
    ) -> list[Condition]:
        text = TextStates(torch.zeros(77, 768, device=self.device, dtype=self.dtype))
        return [Condition(text, text if self._guided else None, scale) for scale in guidance_scales]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents[:, :3].clamp(-1, 1) * 127 + 128).permute(0, 2, 3, 1).to(torch.uint8)

    preview = decode

    def use_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        pass


def draw(engine: DiffusionEngine, requests: Sequence[ImageRequest], at_once: int) -> list[Image]:
    """The pictures of all requests in the order of the requests; a new request enters for each that completes.

    Stops the program if one fails.
    """
    images: dict[tuple[str, int], Image] = {}
    waiting = list(requests)
    live = 0
    while waiting or live:
        while waiting and live < at_once:
            engine.add(waiting.pop(0))
            live += 1
        for event in engine.step():
            if isinstance(event, Failed):
                raise SystemExit(f"request {event.request_id} failed: {event.error}")
            if isinstance(event, Image):
                images[event.request_id, event.index] = event
            live -= isinstance(event, Completed)
    return [images[request.id, index] for request in requests for index in range(request.n)]
