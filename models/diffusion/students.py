"""The few-step students of a teacher: those that a bundle's manifest.json names, and telling one from the other.

    "students": {SAMPLER: {"lora": FILE, ...}}
    "loras":    {NAME: {"file": FILE, "sampler": SAMPLER, ...}}

with, beside the file, "guidance_scale" (distilled in), "steps" (default 4) and, for the sampler consistency,
"sigma_min", "sigma_max", "sigma_data" and "sigmas": {STEPS: [SIGMA, ...]}, the time points found by search. Each file
is a LoRA of the teacher. One under "students" is fused into a copy of the teacher, which then runs the sampler; one
under "loras" acts where a request names it. One that names no sampler is a LoRA as any other, and needs its file only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel.samplers.library import SAMPLERS
from accel.samplers.schedules import LatentConsistencySchedule, NoiseSchedule
from models.diffusion.folder import Folder, read_json
from models.diffusion.model import SamplerDefaults, StudentLora
from models.errors import ModelError

MANIFEST = "manifest.json"
SAMPLERS_OF_STUDENTS = {"students": ("consistency",), "loras": ("lcm", "consistency")}


@dataclass(frozen=True, slots=True)
class Student:
    """A LoRA that makes a student of the teacher for one sampler; the schedule is what its plans are made of."""

    file: Path
    sampler: str
    defaults: SamplerDefaults
    schedule: NoiseSchedule


@dataclass(frozen=True, slots=True)
class Students:
    """What a folder's manifest names: students by sampler, student LoRAs and all other LoRAs by name."""

    networks: Mapping[str, Student]
    loras: Mapping[str, Student]
    plain: Mapping[str, Path]

    def lora_cards(self) -> dict[str, StudentLora]:
        return {name: StudentLora(student.sampler, student.defaults) for name, student in self.loras.items()}


def read_students(folder: Path, schedule: NoiseSchedule) -> Students:
    """Read "students" and "loras" of a folder's manifest.json; there are none where it has no manifest.

    Args:
        schedule: of the teacher.

    Raises:
        ModelError: an entry lacks something or has a value that is not served.
    """
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    students: dict[str, dict[str, Student]] = {"students": {}, "loras": {}}
    plain: dict[str, Path] = {}
    for group, file_key in (("students", "lora"), ("loras", "file")):
        entries = manifest.get(group, {})
        if not isinstance(entries, dict):
            raise ModelError(f"{path}: {group}: {entries!r} is not an object")
        for name, entry in entries.items():
            try:
                sampler = entry.get("sampler") if group == "loras" else name
                file = folder / entry[file_key]
                if sampler is None:
                    plain[name] = file
                    continue
                allowed = SAMPLERS_OF_STUDENTS[group]
                if sampler not in allowed:
                    raise ValueError(f"sampler: {sampler!r}; allowed: {', '.join(allowed)}")
                students[group][name] = _student(file, sampler, entry, schedule)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
                raise ModelError(f"{path}: {group}: {name}: {reason}") from None
    return Students(students["students"], students["loras"], plain)


def check_roles(folder: Folder, kind: str, scheduler: Mapping[str, Any]) -> None:
    """A network with embedded guidance is an LCM student, one without is a teacher; each must be where it belongs.

    Raises:
        ModelError: one is in the other's place.
    """
    beside = (folder.path / "unet_lcm").is_dir()
    alone = kind == "lcm" or (scheduler.get("_class_name") == "LCMScheduler" and not beside)
    path = folder.path / "unet" / "config.json"
    embedded = folder.config("unet").get("time_cond_proj_dim")
    if embedded is not None and not alone:
        raise ModelError(
            f"{path}: time_cond_proj_dim is {embedded!r}: this is an LCM student where the teacher is expected; "
            "a student belongs in unet_lcm, or in a LatentConsistencyModelPipeline's folder"
        )
    if embedded is None and kind == "lcm":
        raise ModelError(f"{path}: time_cond_proj_dim is not set: this is a teacher where an LCM student is expected")
    if beside and folder.config("unet_lcm").get("time_cond_proj_dim") is None:
        path = folder.path / "unet_lcm" / "config.json"
        raise ModelError(f"{path}: time_cond_proj_dim is not set: this is a teacher where an LCM student is expected")


def _student(file: Path, sampler: str, entry: Mapping[str, Any], schedule: NoiseSchedule) -> Student:
    if sampler == "consistency":
        if entry["sigma_data"] != 1:
            raise ValueError(f"sigma_data: {entry['sigma_data']!r}; allowed: 1")
        searched = {int(steps): tuple(map(float, sigmas)) for steps, sigmas in entry.get("sigmas", {}).items()}
        ends = float(entry["sigma_min"]), float(entry["sigma_max"])
        schedule = LatentConsistencySchedule.on(schedule, *ends, searched)
    defaults = SamplerDefaults(
        steps=int(entry.get("steps", 4)),
        guidance_scale=float(entry["guidance_scale"]),
        spacing="trailing",
        max_steps=SAMPLERS[sampler].most_steps(schedule),
        fixed_guidance=True,
    )
    return Student(file, sampler, defaults, schedule)
