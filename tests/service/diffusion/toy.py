"""A small fake model: a nonlinear denoiser that depends on x, t, alpha and the condition, and faults to inject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from accel.samplers.schedules import NoiseSchedule
from models.diffusion.model import Condition, ModelCard, SamplerDefaults, TextStates
from service.config import EngineSettings
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import Event, ImageRequest

CHANNELS, SCALE = 2, 16

CARD = ModelCard(
    name="toy",
    kind="sd",
    source="toy",
    revision="0",
    default_size=(64, 64),
    size_multiple=8 * 2,
    latent_channels=CHANNELS,
    scale=SCALE,
    max_prompt_tokens=16,
    num_classes=None,
    default_sampler="ddim",
    samplers={
        "ddim": SamplerDefaults(steps=20, guidance_scale=5.0, spacing="leading"),
        "euler": SamplerDefaults(steps=20, guidance_scale=5.0, spacing="leading"),
        "euler_a": SamplerDefaults(steps=20, guidance_scale=5.0, spacing="trailing"),
        "dpmpp_2m": SamplerDefaults(steps=10, guidance_scale=5.0, spacing="linspace", karras=True),
        "dpmpp_2m_sde": SamplerDefaults(steps=10, guidance_scale=5.0, spacing="linspace"),
        "lcm": SamplerDefaults(steps=4, guidance_scale=1.5, spacing="trailing", max_steps=50),
    },
    loras=("ink", "moss"),
    lora_digests={"ink": "1" * 64, "moss": "2" * 64},
)


class ToyModel:
    """Implements DiffusionModel.

    A prompt that starts with "poison" makes its latents NaN.

    evaluations: network rows run, a guided row counted twice; calls: the same for each call.
    encoded, decoded: batch sizes.
    fit, decode_fit: network rows or pictures above which a call runs out of memory.
    unencodable: prompts that the text encoder fails on.
    on_call: called with (network, conditions) before each evaluation; may block or raise.
    """

    def __init__(self, card: ModelCard = CARD) -> None:
        self.card = card
        self._schedule = NoiseSchedule.from_config(
            {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        )
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.evaluations = 0
        self.calls: list[int] = []
        self.encoded: list[int] = []
        self.decoded: list[int] = []
        self.fit: int | None = None
        self.decode_fit: int | None = None
        self.unencodable: set[str] = set()
        self.undecodable = False
        self.on_call: Callable[[str, Sequence[Condition]], None] = lambda network, conditions: None
        self.loras: tuple[tuple[str, float], ...] = ()
        self._networks = {"base": ToyDenoiser(self, "base", 1.0), "student": ToyDenoiser(self, "student", 0.7)}

    def denoiser(self, sampler: str, loras: Sequence[tuple[str, float]] = ()) -> ToyDenoiser:
        return self._networks["student" if sampler == "lcm" else "base"]

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
        self.encoded.append(len(prompts))
        for prompt, _ in prompts:
            if prompt in self.unencodable:
                raise RuntimeError("the text encoder fell over")
        return [
            Condition(self._text(prompt), self._text(negative) if scale > 1 and sampler != "lcm" else None, scale)
            for (prompt, negative), scale in zip(prompts, guidance_scales, strict=True)
        ]

    def _text(self, prompt: str) -> TextStates:
        if prompt.startswith("poison"):
            return TextStates(torch.full((1, CHANNELS), float("nan")))
        codes = torch.tensor([ord(character) for character in prompt] or [0], dtype=torch.float32)
        states = torch.stack([(codes / 50).sin().mean(), (codes / 20).cos().mean()])
        return TextStates(states.view(1, CHANNELS) + sum(scale for _, scale in self.loras))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.decoded.append(len(latents))
        if self.undecodable:
            raise RuntimeError("the decoder fell over")
        if self.decode_fit is not None and len(latents) > self.decode_fit:
            raise torch.OutOfMemoryError("no room to decode")
        pixels = ((latents.tanh() + 1) * 127.5).nan_to_num().to(torch.uint8).mean(dim=1, dtype=torch.float32)
        large = pixels.to(torch.uint8).repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
        return large.unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode(latents)

    def use_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        self.loras = tuple(loras)


class ToyDenoiser:
    def __init__(self, model: ToyModel, name: str, gain: float) -> None:
        self._model, self._name, self._gain = model, name, gain

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, alpha: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        model = self._model
        model.on_call(self._name, conditions)
        rows = sum(condition.evaluations for condition in conditions)
        if model.fit is not None and rows > model.fit:
            raise torch.OutOfMemoryError("no room for the batch")
        model.evaluations += rows
        model.calls.append(rows)
        shift = sum(scale * (index + 1) for index, (_, scale) in enumerate(model.loras))
        # Row by row, so that a row's rounding does not depend on its neighbours.
        return torch.stack(
            [self._row(x[i], t[i], alpha[i], condition, shift) for i, condition in enumerate(conditions)]
        )

    def _row(
        self, x: torch.Tensor, t: torch.Tensor, alpha: torch.Tensor, condition: Condition, shift: float
    ) -> torch.Tensor:
        def branch(states: TextStates) -> torch.Tensor:
            mixed = x + 0.3 * x.roll(1, dims=-1) + states.hidden.view(CHANNELS, 1, 1) + shift
            return (self._gain * mixed * alpha + torch.sin(t / 100)).tanh()

        assert condition.positive is not None
        estimate = branch(condition.positive)
        if condition.negative is not None:
            negative = branch(condition.negative)
            estimate = negative + condition.guidance_scale * (estimate - negative)
        if condition.positive.hidden.isnan().any():
            return estimate * float("nan")
        return estimate


def request(id: str = "a", **changes: object) -> ImageRequest:
    plain = ImageRequest(
        id=id,
        prompt=f"a picture of {id}",
        negative_prompt="",
        n=1,
        width=64,
        height=64,
        steps=5,
        guidance_scale=1.0,
        sampler="ddim",
        eta=0.0,
        seed=7,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def settings(**changes: int | float) -> EngineSettings:
    return replace(EngineSettings(max_batch=8, max_running=16), **changes)  # type: ignore[arg-type]


def drain(engine: DiffusionEngine, limit: int = 10_000) -> list[Event]:
    """Every event until the engine is idle."""
    events: list[Event] = []
    for _ in range(limit):
        if not engine.has_work():
            return events
        events.extend(engine.step())
    raise AssertionError(f"the engine still has work after {limit} steps")
