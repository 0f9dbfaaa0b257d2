"""What each kind of model offers: its samplers and what a request gets that names no more than one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.diffusion.folder import read_json
from models.diffusion.model import SamplerDefaults
from models.diffusion.students import Students
from models.errors import ModelError

SPACING_BY_CLASS = {  # what diffusers assumes where a scheduler config leaves timestep_spacing out
    "ddim": "leading",
    "euler": "linspace",
    "euler_a": "linspace",
    "dpmpp_2m": "linspace",
    "dpmpp_2m_sde": "linspace",
}
GUIDANCE = {"sd": 7.5, "sdxl": 5.0}


def latent_samplers(kind: str, scheduler: Mapping[str, Any]) -> tuple[str, dict[str, SamplerDefaults]]:
    """(default sampler, samplers) of Stable Diffusion and SDXL folders, which say nothing but their spacing."""
    samplers = {}
    for name, assumed in SPACING_BY_CLASS.items():
        spacing = scheduler.get("timestep_spacing", assumed)
        steps, karras = (25, True) if name.startswith("dpmpp") else (50 if name == "ddim" else 30, False)
        samplers[name] = SamplerDefaults(steps, GUIDANCE[kind], spacing, karras)
    return "dpmpp_2m", samplers


def lcm_samplers() -> tuple[str, dict[str, SamplerDefaults]]:
    """(default sampler, samplers) of a latent consistency model, as its stock pipeline has them."""
    return "lcm", {"lcm": SamplerDefaults(4, 8.5, "leading")}


def with_student(samplers: Mapping[str, SamplerDefaults]) -> tuple[str, dict[str, SamplerDefaults]]:
    """(default sampler, samplers) of a teacher with an LCM student beside it and no manifest that says otherwise."""
    return "lcm", {**samplers, "lcm": SamplerDefaults(4, 2.0, "trailing")}


def lcm_by_lora() -> dict[str, SamplerDefaults]:
    """The sampler that LCM-LoRAs (Luo et al. 2023b) are made for, on a model that is no student itself."""
    return {"lcm": SamplerDefaults(4, 1.0, "trailing", needs_lora=True)}


def with_students(samplers: Mapping[str, SamplerDefaults], students: Students) -> dict[str, SamplerDefaults]:
    """The samplers and those of the students: their guidance is theirs, their steps those that `samplers` states."""
    merged = dict(samplers)
    for name, student in students.networks.items():
        merged[name] = replace(student.defaults, steps=samplers.get(name, student.defaults).steps)
    for student in students.loras.values():
        merged.setdefault(student.sampler, replace(student.defaults, fixed_guidance=False, needs_lora=True))
    return merged


def consistency_samplers() -> tuple[str, dict[str, SamplerDefaults]]:
    """(default sampler, samplers) of a pixel-space consistency model."""
    return "consistency", {"consistency": SamplerDefaults(1, 1.0, "leading")}


def manifest_samplers(folder: Path) -> tuple[str, dict[str, SamplerDefaults]] | None:
    """What a bundle's manifest.json says of itself under "serving"; None for a folder that is no bundle."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    serving = read_json(path).get("serving")
    if serving is None:
        return None
    try:
        samplers = {name: SamplerDefaults(**values) for name, values in serving["samplers"].items()}
        return str(samplers and serving["default_sampler"]), samplers
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: serving needs default_sampler and samplers with their defaults: {error!r}") from None
