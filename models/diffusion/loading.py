"""From a name on the command line to a model that draws.

    load_model(source) -> resolve_source -> read_folder -> the kind's builder -> LoadedModel

Whatever is missing, damaged or of another kind ends in a ModelError of one line that names the file.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from accel.samplers.schedules import NoiseSchedule
from models.diffusion import cards
from models.diffusion.denoiser import ConsistencyDenoiser, TextDenoiser
from models.diffusion.dtype import resolve_device, resolve_dtype
from models.diffusion.folder import Folder, read_folder
from models.diffusion.loaded import LoadedModel
from models.diffusion.lora import LoraSet
from models.diffusion.model import ModelCard, SamplerDefaults
from models.diffusion.source import HUB_ID, Source, resolve_source, snapshot
from models.diffusion.text import TextEncoder, load_text
from models.diffusion.unet import load_unet
from models.diffusion.vae import LatentDecoder, PixelDecoder, load_decoder
from models.errors import LoraError, ModelError

logger = logging.getLogger(__name__)

KINDS = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "LatentConsistencyModelPipeline": "lcm",
    "ConsistencyModelPipeline": "consistency",
}
CLIPPING_SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler")  # clip_sample is true unless it says otherwise
SCHEDULER = "scheduler_config.json"


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    loras: Sequence[tuple[str, str]] = (),
    cache_dir: Path,
) -> LoadedModel:
    """Load a model for inference.

    Args:
        source: a bundle's name, a folder in diffusers' format, or a hub id.
        revision: branch, tag or commit of a hub id.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:N.
        loras: (name, file or hub id) pairs, loaded and left inactive; an empty name is taken from the file's stem.
        cache_dir: where bundles and hub files are kept.

    Raises:
        ModelError: one line on what is missing, damaged or not served; LoraError for LoRA files.
    """
    where = resolve_device(device)
    with _collector_paused():
        return _load(source, revision, dtype, where, loras, cache_dir)


def _load(
    source: str,
    revision: str | None,
    dtype: str,
    device: torch.device,
    loras: Sequence[tuple[str, str]],
    cache_dir: Path,
) -> LoadedModel:
    found = resolve_source(source, revision, cache_dir)
    folder = read_folder(found.path)
    kind = KINDS.get(folder.pipeline)
    if kind is None:
        raise ModelError(f"{found.path} is a {folder.pipeline}; served are {', '.join(KINDS)}")
    form = resolve_dtype(dtype, device)
    files = [(name or Path(file).stem, _lora_file(file, cache_dir)) for name, file in loras]
    build = _consistency if kind == "consistency" else _latent
    model = build(found, folder, kind, device, form, files)
    logger.info("loaded %s (%s, %s) on %s in %s", found.name, kind, found.revision, device, form)
    return model


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Importing diffusers makes objects that all live on; looking for garbage among them costs a tenth of the start."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _latent(
    source: Source, folder: Folder, kind: str, device: torch.device, dtype: torch.dtype, loras: list[tuple[str, Path]]
) -> LoadedModel:
    """Stable Diffusion, SDXL, and latent consistency models; with a student in unet_lcm/ where a bundle has one."""
    scheduler = folder.config("scheduler", SCHEDULER)
    schedule = _schedule(folder, scheduler)
    unet = load_unet(folder, "unet", device, dtype)
    networks = [unet]
    main = _text_denoiser(folder, unet, scheduler, schedule)
    default, samplers = cards.lcm_samplers() if main.embeds_guidance else cards.latent_samplers(kind, scheduler)
    if kind == "lcm" and not main.embeds_guidance:
        raise ModelError(f"{folder.path / 'unet' / 'config.json'}: an LCM's time_cond_proj_dim must be set")
    denoisers = dict.fromkeys(samplers, main)
    if (folder.path / "unet_lcm").is_dir():
        student = load_unet(folder, "unet_lcm", device, dtype)
        networks.append(student)
        denoisers["lcm"] = _text_denoiser(folder, student, folder.config("scheduler_lcm", SCHEDULER), schedule)
        default, samplers = cards.with_student(samplers)
    if (stated := cards.manifest_samplers(folder.path)) is not None:
        default, samplers = stated
        if unknown := [name for name in (default, *samplers) if name not in denoisers or default not in samplers]:
            raise ModelError(f"{folder.path / 'manifest.json'}: serving names {unknown[0]}, which the model cannot run")
    text = load_text(folder, device, dtype)
    decoder = load_decoder(folder, device, dtype)
    _check_fit(folder, unet.config, text, decoder)
    encoders = {f"text_encoder{suffix}": tower.encoder for suffix, tower in zip(("", "_2"), text.towers, strict=False)}
    lora_set = _load_loras(LoraSet(networks, encoders), loras)
    card = _card(source, kind, unet.config, decoder.scale, text.max_tokens, (default, samplers), lora_set)
    return LoadedModel(
        card,
        schedule,
        device,
        dtype,
        {name: denoisers[name] for name in samplers},
        decoder,
        lora_set,
        text,
        zero_negative=bool(folder.options.get("force_zeros_for_empty_prompt", kind == "sdxl")),
    )


def _consistency(
    source: Source, folder: Folder, kind: str, device: torch.device, dtype: torch.dtype, loras: list[tuple[str, Path]]
) -> LoadedModel:
    folder.component("scheduler", ("CMStochasticIterativeScheduler",))
    scheduler = folder.config("scheduler", SCHEDULER)
    schedule = _schedule(folder, scheduler)
    unet = load_unet(folder, "unet", device, dtype)
    denoiser = ConsistencyDenoiser(
        unet,
        sigma_min=float(scheduler["sigma_min"]),
        sigma_data=float(scheduler["sigma_data"]),
        clip_denoised=bool(scheduler.get("clip_denoised", True)),
    )
    lora_set = _load_loras(LoraSet([unet]), loras)
    default, samplers = cards.consistency_samplers()
    card = _card(source, kind, unet.config, PixelDecoder.scale, None, (default, samplers), lora_set)
    return LoadedModel(card, schedule, device, dtype, dict.fromkeys(samplers, denoiser), PixelDecoder(), lora_set)


def _schedule(folder: Folder, scheduler: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule; a bundle's student adds its own distillation grid to the teacher's."""
    path = folder.path / "scheduler" / SCHEDULER
    student = folder.path / "scheduler_lcm" / SCHEDULER
    grid: dict[str, Any] = {}
    if student.is_file():
        values = folder.config("scheduler_lcm", SCHEDULER)
        grid = {key: values[key] for key in ("original_inference_steps", "timestep_scaling") if key in values}
        for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "rescale_betas_zero_snr"):
            if values.get(key) != scheduler.get(key):
                raise ModelError(f"{student}: {key} {values.get(key)!r} differs from {scheduler.get(key)!r} in {path}")
    try:
        return NoiseSchedule.from_config({**scheduler, **grid})
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None


def _text_denoiser(folder: Folder, unet: Any, scheduler: Mapping[str, Any], schedule: NoiseSchedule) -> TextDenoiser:
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise ModelError(
            f"{folder.path / 'scheduler' / SCHEDULER}: prediction_type epsilon cannot run with rescale_betas_zero_snr: "
            "at the last timestep there is no signal to recover from the noise"
        )
    clips = scheduler.get("clip_sample", True) and scheduler.get("_class_name") in CLIPPING_SCHEDULERS
    return TextDenoiser(unet, prediction, float(scheduler.get("clip_sample_range", 1.0)) if clips else None)


def _check_fit(folder: Folder, unet: Any, text: TextEncoder, decoder: LatentDecoder) -> None:
    """The components must have been made for one another."""
    width = sum(tower.encoder.config.hidden_size for tower in text.towers)
    if width != unet.cross_attention_dim:
        raise ModelError(
            f"{folder.path}: the text encoder gives {width} features, the UNet takes {unet.cross_attention_dim}"
        )
    if decoder.channels != unet.in_channels:
        raise ModelError(
            f"{folder.path}: the UNet denoises {unet.in_channels} channels, the VAE decodes {decoder.channels}"
        )


def _card(
    source: Source,
    kind: str,
    unet: Any,
    scale: int,
    max_prompt_tokens: int | None,
    samplers: tuple[str, Mapping[str, SamplerDefaults]],
    loras: LoraSet,
) -> ModelCard:
    side = unet.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    halvings = 2 ** (len(unet.block_out_channels) - 1)
    return ModelCard(
        name=source.name,
        kind=kind,
        source=source.origin,
        revision=source.revision,
        default_size=(width * scale, height * scale),
        size_multiple=max(8, scale) if scale > 1 else halvings,  # a latent UNet pads odd sizes itself
        latent_channels=unet.in_channels,
        scale=scale,
        max_prompt_tokens=max_prompt_tokens,
        num_classes=unet.get("num_class_embeds") if kind == "consistency" else None,
        default_sampler=samplers[0],
        samplers=samplers[1],
        loras=loras.names,
    )


def _load_loras(lora_set: LoraSet, files: list[tuple[str, Path]]) -> LoraSet:
    for name, path in files:
        lora_set.load(name, path)
    return lora_set


def _lora_file(file: str, cache_dir: Path) -> Path:
    path = Path(file).expanduser()
    if path.exists() or not HUB_ID.fullmatch(file):
        return path
    folder = snapshot(file, None, cache_dir, ["*.safetensors"])
    found = sorted(folder.rglob("*.safetensors"))
    if len(found) != 1:
        raise LoraError(f"LoRA {file} holds {len(found)} safetensors files; download the one you want and name that")
    return found[0]
