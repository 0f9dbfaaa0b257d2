"""From a name on the command line to a model that draws.

    load_model(source) -> resolve_source -> read_folder -> the kind's builder -> LoadedModel

Whatever is missing, damaged or of another kind ends in a ModelError of one line that names the file.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from accel.samplers.library import SAMPLERS
from accel.samplers.schedules import LatentConsistencySchedule, NoiseSchedule
from models.diffusion import cards
from models.diffusion.denoiser import ConsistencyDenoiser, LatentConsistencyDenoiser, TextDenoiser
from models.diffusion.dtype import resolve_device, resolve_dtype
from models.diffusion.folder import Folder, quiet_libraries, read_folder
from models.diffusion.loaded import LoadedModel, Network
from models.diffusion.lora import LoraSet, fuse
from models.diffusion.model import ModelCard, SamplerDefaults
from models.diffusion.source import HUB_ID, Source, resolve_source, snapshot
from models.diffusion.students import Student, Students, check_roles, read_students
from models.diffusion.text import TextEncoder, load_text
from models.diffusion.unet import load_unet, place
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
            Where both are the name of a LoRA that comes with the model, that is meant.
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
    """Stable Diffusion, SDXL, and latent consistency models; with the students beside it where a bundle has them."""
    scheduler = folder.config("scheduler", SCHEDULER)
    schedule = _schedule(folder, scheduler)
    check_roles(folder, kind, scheduler)
    students = read_students(folder.path, schedule)
    unet = load_unet(folder, "unet", device, dtype)
    unets = [unet]
    main = _text_denoiser(folder, unet, scheduler, schedule)
    default, samplers = cards.lcm_samplers() if main.embeds_guidance else cards.latent_samplers(kind, scheduler)
    if loras and "lcm" not in samplers:
        samplers |= cards.lcm_by_lora()
    networks = {name: Network(main, schedule) for name in samplers}
    if (folder.path / "unet_lcm").is_dir():
        unets.append(load_unet(folder, "unet_lcm", device, dtype))
        config = folder.config("scheduler_lcm", SCHEDULER)
        networks["lcm"] = Network(_text_denoiser(folder, unets[-1], config, schedule), schedule)
        default, samplers = cards.with_student(samplers)
    for name, student in students.networks.items():
        unets.append(_fused(folder, student.file, device, dtype))
        networks[name] = _student_network(folder, unets[-1], student, scheduler)
    lora_networks = {
        name: _student_network(folder, unet, student, scheduler) for name, student in students.loras.items()
    }
    for name, student in students.loras.items():
        networks.setdefault(student.sampler, lora_networks[name])
    default, samplers = _samplers(folder, cards.manifest_samplers(folder.path) or (default, samplers), networks)
    samplers = cards.with_students(samplers, students)
    text = load_text(folder, device, dtype)
    decoder = load_decoder(folder, device, dtype)
    _check_fit(folder, unet.config, text, decoder)
    encoders = {f"text_encoder{suffix}": tower.encoder for suffix, tower in zip(("", "_2"), text.towers, strict=False)}
    lora_set = LoraSet(unets, encoders)
    for name, student in students.loras.items():
        lora_set.load(name, student.file, [unet])
    _load_loras(lora_set, [*students.plain.items(), *loras])
    card = _card(source, kind, unet.config, decoder.scale, text.max_tokens, (default, samplers), lora_set, students)
    return LoadedModel(
        card,
        device,
        dtype,
        {name: networks[name] for name in samplers},
        decoder,
        lora_set,
        text,
        zero_negative=bool(folder.options.get("force_zeros_for_empty_prompt", kind == "sdxl")),
        students=lora_networks,
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
    networks = dict.fromkeys(samplers, Network(denoiser, schedule))
    default, samplers = _samplers(folder, (default, samplers), networks)
    card = _card(source, kind, unet.config, PixelDecoder.scale, None, (default, samplers), lora_set)
    return LoadedModel(card, device, dtype, networks, PixelDecoder(), lora_set)


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


def _samplers(
    folder: Folder, stated: tuple[str, Mapping[str, SamplerDefaults]], networks: Mapping[str, Network]
) -> tuple[str, dict[str, SamplerDefaults]]:
    """(default sampler, samplers), each with the most steps that its network has a plan of."""
    default, samplers = stated
    if unknown := [name for name in (default, *samplers) if name not in networks or default not in samplers]:
        raise ModelError(f"{folder.path / 'manifest.json'}: serving names {unknown[0]}, which the model cannot run")
    most = {name: SAMPLERS[name].most_steps(networks[name].schedule) for name in samplers}
    return default, {name: replace(values, max_steps=most[name]) for name, values in samplers.items()}


def _fused(folder: Folder, lora: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Another copy of the teacher with a LoRA added to its weights, in float32 before they are rounded to `dtype`."""
    unet = load_unet(folder, "unet", device, torch.float32)
    fuse(unet, lora)
    with quiet_libraries():  # diffusers warns of any change of dtype
        return place(unet.to(dtype), device)


def _student_network(folder: Folder, unet: Any, student: Student, scheduler: Mapping[str, Any]) -> Network:
    """What runs a student's sampler on the teacher's UNet with the student's LoRA."""
    schedule = student.schedule
    if not isinstance(schedule, LatentConsistencySchedule):
        return Network(_text_denoiser(folder, unet, scheduler, schedule, distilled=True), schedule)
    if scheduler.get("prediction_type") != "v_prediction":
        raise ModelError(
            f"{folder.path / 'scheduler' / SCHEDULER}: prediction_type is {scheduler.get('prediction_type')!r}; "
            f"with the consistency model {student.file.name} it must be v_prediction"
        )
    return Network(LatentConsistencyDenoiser(unet, schedule.sigma_min), schedule)


def _text_denoiser(
    folder: Folder, unet: Any, scheduler: Mapping[str, Any], schedule: NoiseSchedule, *, distilled: bool = False
) -> TextDenoiser:
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise ModelError(
            f"{folder.path / 'scheduler' / SCHEDULER}: prediction_type epsilon cannot run with rescale_betas_zero_snr: "
            "at the last timestep there is no signal to recover from the noise"
        )
    clips = scheduler.get("clip_sample", True) and scheduler.get("_class_name") in CLIPPING_SCHEDULERS
    clip = float(scheduler.get("clip_sample_range", 1.0)) if clips else None
    return TextDenoiser(unet, prediction, clip, distilled=distilled)


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
    students: Students | None = None,
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
        lora_digests=loras.digests,
        student_loras=students.lora_cards() if students is not None else {},
    )


def _load_loras(lora_set: LoraSet, files: Sequence[tuple[str, Path]]) -> LoraSet:
    """Load files; one that is no file but the name of a LoRA that came with the model is there already."""
    for name, path in files:
        if not (name in lora_set.names and path == Path(name) and not path.exists()):
            lora_set.load(name, path)
    return lora_set


def _lora_file(file: str, cache_dir: Path) -> Path:
    path = Path(os.path.expanduser(file))
    if path.exists() or not HUB_ID.fullmatch(file):
        return path
    folder = snapshot(file, None, cache_dir, ["*.safetensors"])
    found = sorted(folder.rglob("*.safetensors"))
    if len(found) != 1:
        raise LoraError(f"LoRA {file} holds {len(found)} safetensors files; download the one you want and name that")
    return found[0]
