"""A loaded model: the parts, behind the contract of `models.diffusion.model`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from accel.samplers.schedules import NoiseSchedule
from models.diffusion.denoiser import ConsistencyDenoiser, TextDenoiser
from models.diffusion.lora import LoraSet
from models.diffusion.model import Condition, ModelCard, TextStates
from models.diffusion.vae import Decoder


class PromptEncoder(Protocol):
    """Prompts to text states; `variant` tells apart the states of one prompt under different LoRA sets."""

    def encode(self, prompts: Sequence[str], variant: Hashable = None) -> list[TextStates]: ...
    def reader(self) -> Callable[[str], bool]: ...


class Network(NamedTuple):
    """A denoiser, and the noise levels that its plans are made of."""

    denoiser: TextDenoiser | ConsistencyDenoiser
    schedule: NoiseSchedule


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Implements `DiffusionModel`.

    networks: what runs each sampler of the card.
    students: what runs the sampler of each of the card's student LoRAs, while it is active.
    text: None for a model without text.
    zero_negative: the states of an empty negative prompt are zeros (SDXL's force_zeros_for_empty_prompt).
    """

    card: ModelCard
    device: torch.device
    dtype: torch.dtype
    networks: Mapping[str, Network]
    decoder: Decoder
    loras: LoraSet
    text: PromptEncoder | None = None
    zero_negative: bool = False
    students: Mapping[str, Network] = field(default_factory=dict)

    def denoiser(self, sampler: str, loras: Sequence[tuple[str, float]] = ()) -> TextDenoiser | ConsistencyDenoiser:
        return self._network(sampler, loras).denoiser

    def schedule(self, sampler: str, loras: Sequence[tuple[str, float]] = ()) -> NoiseSchedule:
        return self._network(sampler, loras).schedule

    def encode(
        self,
        prompts: Sequence[tuple[str, str]],
        guidance_scales: Sequence[float],
        sampler: str,
        size: tuple[int, int],
        owner: str = "",
    ) -> list[Condition]:
        """Encode (prompt, negative prompt) pairs under the active LoRA set; see `DiffusionModel.encode`.

        A negative prompt is encoded only where it acts: guidance_scale > 1 in a network that does not guide itself. A
        class label is not text: the caller sets it with `dataclasses.replace`.
        """
        network = self.denoiser(sampler, self.loras.active)
        if self.text is None or isinstance(network, ConsistencyDenoiser):
            return [Condition(None, None, 1.0) for _ in prompts]
        guided = [scale > 1 and not network.guides_itself for scale in guidance_scales]
        positives = [prompt for prompt, _ in prompts]
        negatives = [negative for (_, negative), row_guided in zip(prompts, guided, strict=True) if row_guided]
        states = self.text.encode([*positives, *negatives], variant=(self.loras.active, owner))
        rest = iter(zip(negatives, states[len(positives) :], strict=True))
        return [
            Condition(positive, self._negative(*next(rest)) if row_guided else None, scale, self._time_ids(size))
            for positive, row_guided, scale in zip(states, guided, guidance_scales, strict=False)
        ]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(latents)

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(latents)

    def reader(self) -> Callable[[str], bool]:
        """Tells whether all of a prompt is read; for any one thread, beside the engine's."""
        return (lambda prompt: True) if self.text is None else self.text.reader()

    def use_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        self.loras.use(loras)

    def _network(self, sampler: str, loras: Sequence[tuple[str, float]]) -> Network:
        for name, _ in loras:
            if name in self.students and self.card.student_loras[name].sampler == sampler:
                return self.students[name]
        return self.networks[sampler]

    def _negative(self, prompt: str, states: TextStates) -> TextStates:
        if prompt or not self.zero_negative or states.pooled is None:
            return states
        return TextStates(torch.zeros_like(states.hidden), torch.zeros_like(states.pooled))

    def _time_ids(self, size: tuple[int, int]) -> tuple[float, ...] | None:
        """SDXL: original size, crop corner, target size, each (height, width); the picture is asked for uncropped."""
        if self.card.kind != "sdxl":
            return None
        width, height = map(float, size)
        return (height, width, 0.0, 0.0, height, width)
