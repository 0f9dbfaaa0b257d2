"""The one contract of all networks: (x, per-row t, conditions) -> denoised.

Batches are laid out [positive branch of all B rows, negative branch of the G rows that have one], so that a row
without a negative branch costs one evaluation. Everything between the network's output and x0 is float32.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from models.diffusion.model import Condition, TextStates
from models.errors import ModelError

CACHED_BATCHES = 4  # a ticking engine returns to the same few batches

# (output, x, alpha, sigma) -> x0, where x = alpha * x0 + sigma * noise.
Prediction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": lambda output, x, alpha, sigma: (x - sigma * output) / alpha,
    "v_prediction": lambda output, x, alpha, sigma: alpha * x - sigma * output,  # Salimans & Ho 2022, section 4
    "sample": lambda output, x, alpha, sigma: output,
}


@dataclass(frozen=True, slots=True)
class Batch:
    """The conditioning of one list of conditions, stacked on the device once."""

    conditions: tuple[Condition, ...]  # held so that the identities this batch is found by stay taken
    guided: torch.Tensor | None  # [G] int64, the rows with a negative branch; None: no row has one
    guidance: torch.Tensor | None  # [G, 1, 1, 1] float32
    arguments: dict[str, Any]  # of the network, all tensors [B + G, ...]

    @property
    def all_guided(self) -> bool:
        return self.guided is not None and len(self.guided) == len(self.conditions)


class TextDenoiser:
    """A text-conditioned UNet, with classifier-free guidance (Ho & Salimans 2022) or guidance embedded in the network.

    Args:
        unet: a UNet2DConditionModel.
        prediction: key of PREDICTIONS.
        clip: x0 is clamped to [-clip, clip]; None: it is not.
        distilled: guidance at one scale was distilled into the weights.
    """

    def __init__(self, unet: Any, prediction: str, clip: float | None = None, *, distilled: bool = False) -> None:
        if prediction not in PREDICTIONS:
            raise ModelError(f"prediction_type {prediction!r} is not served; served are {', '.join(PREDICTIONS)}")
        self._unet = unet
        self._dtype, self._device = unet.dtype, unet.device  # asked once: both walk over all modules, for milliseconds
        self._to_x0 = PREDICTIONS[prediction]
        self._clip = clip
        self._distilled = distilled
        self._batches: OrderedDict[tuple[int, ...], Batch] = OrderedDict()

    @property
    def network(self) -> Any:
        """The UNet."""
        return self._unet

    def on(self, network: Any) -> Self:
        """The same denoiser with another network in place of its UNet: of the same config, dtype and device."""
        twin = copy.copy(self)
        twin._unet, twin._batches = network, OrderedDict()
        return twin

    @property
    def embeds_guidance(self) -> bool:
        """Guidance is an input of the network."""
        return bool(self._unet.config.time_cond_proj_dim is not None)

    @property
    def guides_itself(self) -> bool:
        """Guidance is an input of the network or distilled into it, so that no row needs a negative branch."""
        return self._distilled or self.embeds_guidance

    @torch.no_grad()
    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, alpha: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        batch = self._batch(conditions)
        sample = x.to(self._dtype, memory_format=torch.channels_last)
        if batch.guided is not None:
            rows = slice(None) if batch.all_guided else batch.guided
            sample, t = torch.cat([sample, sample[rows]]), torch.cat([t, t[rows]])
        output = self._unet(sample, t, return_dict=False, **batch.arguments)[0].float()
        output = _guide(output, batch, len(conditions)).contiguous()
        return self._denoised(output, x, alpha.view(-1, 1, 1, 1))

    def _denoised(self, output: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        denoised = self._to_x0(output, x, alpha, (1 - alpha * alpha).sqrt())
        return denoised if self._clip is None else denoised.clamp(-self._clip, self._clip)

    def _batch(self, conditions: Sequence[Condition]) -> Batch:
        key = tuple(map(id, conditions))
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = self._stack(tuple(conditions))
            if len(self._batches) > CACHED_BATCHES:
                self._batches.popitem(last=False)
        return batch

    def _stack(self, conditions: tuple[Condition, ...]) -> Batch:
        guided = [row for row, condition in enumerate(conditions) if condition.negative is not None]
        texts = [_text(condition.positive) for condition in conditions]
        texts += [_text(conditions[row].negative) for row in guided]
        arguments: dict[str, Any] = {"encoder_hidden_states": torch.stack([text.hidden for text in texts])}
        scales = torch.tensor([condition.guidance_scale for condition in conditions])
        if self.embeds_guidance:
            width = self._unet.config.time_cond_proj_dim
            arguments["timestep_cond"] = self._send(guidance_embedding(scales, width).to(self._dtype))
        if self._unet.config.addition_embed_type == "text_time":
            sizes = [condition.time_ids for condition in conditions] + [conditions[row].time_ids for row in guided]
            arguments["added_cond_kwargs"] = {
                "text_embeds": torch.stack([text.pooled for text in texts if text.pooled is not None]),
                "time_ids": self._send(torch.tensor(sizes, dtype=self._dtype)),
            }
        if not guided:
            return Batch(conditions, None, None, arguments)
        rows = torch.tensor(guided)
        return Batch(conditions, self._send(rows), self._send(scales[rows].view(-1, 1, 1, 1)), arguments)

    def _send(self, values: torch.Tensor) -> torch.Tensor:
        return to_device(values, self._device)


class LatentConsistencyDenoiser(TextDenoiser):
    """A consistency model in latent space (Song et al. 2023, appendix C) whose network is a v-predicting UNet.

    On latents of unit variance (sigma_data = 1) the scaled input c_in * x_ve of Karras et al. 2022, table 1, is the
    variance-preserving x, and their F is -v. With sigma = sqrt(1 - alpha^2) / alpha and e = sigma - sigma_min,

        denoised = c_skip * x_ve - c_out * v,  x_ve = x / alpha,  c_skip = 1 / (e^2 + 1),  c_out = e / sqrt(sigma^2 + 1)

    which is x_ve itself at sigma_min, and a v-prediction's x0 where sigma_min is 0.

    Args:
        unet: a UNet2DConditionModel, guidance distilled into it.
        sigma_min: where the consistency function is the identity.
    """

    def __init__(self, unet: Any, sigma_min: float) -> None:
        super().__init__(unet, "v_prediction", distilled=True)
        self._sigma_min = sigma_min

    def _denoised(self, output: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        excess = (1 - alpha * alpha).sqrt() / alpha - self._sigma_min
        return x / (alpha * (excess * excess + 1)) - alpha * excess * output


class ConsistencyDenoiser:
    """A pixel-space consistency model (Song et al. 2023, appendix C) behind the variance-preserving contract.

    The network lives in the variance-exploding space x_ve = x0 + sigma * noise = x / alpha, where
    alpha = 1 / sqrt(1 + sigma^2). Its timestep is t = 250 ln(sigma), and sigma is taken from t: near the data, alpha in
    float32 no longer tells one sigma from another.

        denoised = c_skip * x_ve + c_out * F(x_ve / sqrt(sigma^2 + sigma_data^2), t)

    Args:
        unet: a UNet2DModel.
        sigma_min, sigma_data, clip_denoised: of the model's CMStochasticIterativeScheduler.
    """

    def __init__(self, unet: Any, *, sigma_min: float, sigma_data: float, clip_denoised: bool) -> None:
        self._unet = unet
        self._dtype, self._device = unet.dtype, unet.device
        self._sigma_min, self._sigma_data = sigma_min, sigma_data
        self._clip_denoised = clip_denoised
        self._labels: tuple[tuple[int | None, ...], torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, alpha: torch.Tensor, conditions: Sequence[Condition]
    ) -> torch.Tensor:
        sigma = (t / 250).exp().view(-1, 1, 1, 1)
        x_ve = x * (1 + sigma * sigma).sqrt()
        norm = (sigma * sigma + self._sigma_data**2).sqrt()
        sample = (x_ve / norm).to(self._dtype, memory_format=torch.channels_last)
        labels = self._class_labels(conditions)
        output: torch.Tensor = self._unet(sample, t, class_labels=labels, return_dict=False)[0].float()
        excess = sigma - self._sigma_min
        c_skip = self._sigma_data**2 / (excess * excess + self._sigma_data**2)
        c_out = excess * self._sigma_data / norm
        denoised = c_skip * x_ve + c_out * output
        return denoised.clamp(-1, 1) if self._clip_denoised else denoised

    def _class_labels(self, conditions: Sequence[Condition]) -> torch.Tensor | None:
        classes = self._unet.config.num_class_embeds
        if classes is None:
            return None
        wanted = tuple(condition.class_label for condition in conditions)
        if self._labels is None or self._labels[0] != wanted:
            for label in wanted:
                if label is None or not 0 <= label < classes:
                    raise ModelError(f"class_label {label} is not allowed; this model draws classes 0 to {classes - 1}")
            self._labels = wanted, to_device(torch.tensor(wanted), self._device)
        return self._labels[1]


def guidance_embedding(guidance_scales: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of 1000 * (guidance_scale - 1): what latent consistency models take as `timestep_cond`.

    Luo et al. 2023, section 4.3, in the scale convention of diffusers' pipelines.

    Args:
        guidance_scales: [B].

    Returns:
        [B, width] float32.
    """
    half = width // 2
    frequencies = torch.exp(-torch.arange(half) * (torch.log(torch.tensor(10000.0)) / (half - 1)))
    phases = 1000.0 * (guidance_scales.float() - 1)[:, None] * frequencies
    embedding = torch.cat([phases.sin(), phases.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width - 2 * half))


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy host values without making the host wait for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _guide(output: torch.Tensor, batch: Batch, rows: int) -> torch.Tensor:
    """[B + G, ...] -> [B, ...]: negative + scale * (positive - negative) in the rows that have a negative branch."""
    if batch.guided is None or batch.guidance is None:
        return output
    positive, negative = output[:rows], output[rows:]
    if batch.all_guided:
        return negative + batch.guidance * (positive - negative)
    return positive.index_copy(0, batch.guided, negative + batch.guidance * (positive[batch.guided] - negative))


def _text(states: TextStates | None) -> TextStates:
    if states is None:
        raise ModelError("a text model was given a condition without text")
    return states
