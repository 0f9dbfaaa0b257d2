"""What the engine needs of a diffusion model, whichever kind it is.

Shapes: B rows of a batch, C latent channels, h and w latent height and width, H and W picture height and width in
pixels, L text tokens, D their width, P width of the pooled text state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from accel.samplers.schedules import NoiseSchedule


@dataclass(frozen=True, slots=True)
class TextStates:
    """One encoded prompt."""

    hidden: torch.Tensor  # [L, D]
    pooled: torch.Tensor | None = None  # [P], SDXL only
    unread: int = 0  # tokens at the prompt's end that the encoder has no room for


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Condition:
    """What one picture is drawn from. Immutable, shared by the pictures of a request.

    negative is None when the row needs no second evaluation: guidance_scale <= 1, or guidance that is embedded in the
    network (LCM) or distilled into it, or a model without text.
    """

    positive: TextStates | None
    negative: TextStates | None
    guidance_scale: float
    time_ids: tuple[float, ...] | None = None  # SDXL size conditioning
    class_label: int | None = None  # class-conditional consistency models

    @property
    def evaluations(self) -> int:
        """Network evaluations one step of this row costs."""
        return 2 if self.negative is not None else 1


class Denoiser(Protocol):
    """One network behind one contract, whatever it predicts (eps, v, x0, LCM, consistency)."""

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, alpha: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        """Estimate x0.

        Args:
            x: [B, C, h, w] float32, variance-preserving latents.
            t: [B] float32, the network's timestep for each row.
            alpha: [B] float32, the signal scale of each row.
            conditions: B of them.

        Returns:
            [B, C, h, w] float32 denoised latents, guidance applied.
        """
        ...


@dataclass(frozen=True, slots=True)
class SamplerDefaults:
    """What a request gets that names the sampler and nothing else, and what it may ask for instead."""

    steps: int
    guidance_scale: float
    spacing: str  # "leading" | "trailing" | "linspace"
    karras: bool = False
    max_steps: int | None = None  # None: the sampler sets no limit
    fixed_guidance: bool = False  # distilled into the network at guidance_scale, and no other can be had
    needs_lora: bool = False  # the network takes few steps only with a LoRA made for that


@dataclass(frozen=True, slots=True)
class StudentLora:
    """A LoRA that makes a few-step student of its model: for which sampler, and what a request gets that names both."""

    sampler: str
    defaults: SamplerDefaults


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a request is checked against. Sizes are in pixels."""

    name: str
    kind: str  # "sd" | "sdxl" | "lcm" | "consistency"
    source: str  # folder or hub id
    revision: str
    default_size: tuple[int, int]  # (width, height)
    size_multiple: int
    latent_channels: int
    scale: int  # pixels per latent cell along one side
    max_prompt_tokens: int | None  # None: no text
    num_classes: int | None
    default_sampler: str
    samplers: Mapping[str, SamplerDefaults]  # only those that this model can run
    loras: tuple[str, ...] = ()
    lora_digests: Mapping[str, str] = field(default_factory=dict)  # sha256 of the file of each of `loras`
    student_loras: Mapping[str, StudentLora] = field(default_factory=dict)  # those of `loras` that are students

    def defaults(self, sampler: str, loras: Sequence[tuple[str, float]] = ()) -> SamplerDefaults:
        """What a request gets that names the sampler and these LoRAs, (name, scale) each."""
        for name, _ in loras:
            student = self.student_loras.get(name)
            if student is not None and student.sampler == sampler:
                return student.defaults
        return self.samplers[sampler]


class DiffusionModel(Protocol):
    """A loaded model. All methods are called from the engine's thread only."""

    @property
    def card(self) -> ModelCard: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def denoiser(self, sampler: str, loras: Sequence[tuple[str, float]] = ()) -> Denoiser:
        """The network that runs the sampler's rows under a LoRA set of (name, scale).

        The bundle's student for "lcm" and "consistency" where it has one, and the teacher with a LoRA made for the
        sampler. The same object for all that can share a batch.
        """
        ...

    def schedule(self, sampler: str, loras: Sequence[tuple[str, float]] = ()) -> NoiseSchedule:
        """The noise levels of that network, which the sampler's plans are made of."""
        ...

    def encode(
        self,
        prompts: Sequence[tuple[str, str]],
        guidance_scales: Sequence[float],
        sampler: str,
        size: tuple[int, int],
        owner: str = "",
    ) -> list[Condition]:
        """Encode (prompt, negative prompt) pairs in one text-encoder batch, under the LoRA set in use.

        `size` is (width, height). Prompts are remembered for their `owner` alone, so that no one can tell, by the time
        that it takes, what others have asked for.
        """
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] float32 latents (x0 scale of the UNet) -> [B, H, W, 3] uint8 on the model's device."""
        ...

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """A cheap [B, H, W, 3] uint8 picture of x0 estimates for partial images; may equal decode."""
        ...

    def use_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Make this set of (name, scale) active for the evaluations that follow; () for none. Idempotent and cheap when
        nothing changes."""
        ...


def as_array(pictures: torch.Tensor) -> np.ndarray:
    """Device pictures to a host array, [B, H, W, 3] uint8."""
    return pictures.cpu().numpy()
