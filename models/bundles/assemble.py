"""Laying a bundle out as folders that stock diffusers pipelines load, or a language model as a folder with its file.

NAME/ is a StableDiffusionPipeline; what else the bundle holds lies beside it, where diffusers ignores it: the student
in unet_lcm/ and scheduler_lcm/, students that are LoRA files in lora/, the scorer in scorer/, evaluation data in eval/.
NAME-lcm/ is a LatentConsistencyModelPipeline of the student and the same other components.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from models.bundles.fetch import fetched_folder
from models.bundles.manifest import LANGUAGE, MANIFEST, Manifest
from models.errors import ModelError

STUDENT = {"unet": "unet_lcm", "scheduler": "scheduler_lcm"}
COMPONENTS = {  # component: (library, file that names its class, key of the class in it)
    "unet": ("diffusers", "config.json", "_class_name"),
    "vae": ("diffusers", "config.json", "_class_name"),
    "scheduler": ("diffusers", "scheduler_config.json", "_class_name"),
    "text_encoder": ("transformers", "config.json", "architectures"),
    "tokenizer": ("transformers", "tokenizer_config.json", "tokenizer_class"),
}


def assembled_folder(manifest: Manifest, cache_dir: Path) -> Path:
    return cache_dir / "models" / manifest.name


def student_folder(manifest: Manifest, cache_dir: Path) -> Path:
    return cache_dir / "models" / f"{manifest.name}-lcm"


def is_assembled(manifest: Manifest, root: Path, cache_dir: Path) -> bool:
    """Whether the folders are there, made from the manifest as it is now in `root`, with every file in full length."""
    folder, student = assembled_folder(manifest, cache_dir), student_folder(manifest, cache_dir)
    try:
        current = (folder / MANIFEST).read_bytes() == (root / MANIFEST).read_bytes()
        whole = all((folder / file.path).stat().st_size == file.size for file in manifest.files)
    except OSError:
        return False
    return current and whole and (manifest.kind == LANGUAGE or (student / "model_index.json").is_file())


def assemble(manifest: Manifest, root: Path, cache_dir: Path) -> None:
    """Build a bundle's folders beside their places and move them in, one after the other."""
    present = {file.path.split("/")[0] for file in manifest.files}
    for component in () if manifest.kind == LANGUAGE else (*COMPONENTS, *STUDENT.values()):
        if component not in present:
            raise ModelError(f"bundle {manifest.name} is not complete: it has no {component}")
    folder, student = assembled_folder(manifest, cache_dir), student_folder(manifest, cache_dir)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".assemble-") as scratch:
        new = Path(scratch) / "model"
        for file in manifest.files:
            origin = root if file.source is None else fetched_folder(manifest.sources[file.source], cache_dir)
            link_or_copy(origin / file.path, new / file.path)
        shutil.copyfile(root / MANIFEST, new / MANIFEST)
        if manifest.kind == LANGUAGE:
            _replace(new, folder)
            return
        _write_index(new, "StableDiffusionPipeline")
        shutil.rmtree(student, ignore_errors=True)  # first: it links into the folder that is about to be replaced
        _replace(new, folder)
        new = Path(scratch) / "student"
        for component in COMPONENTS:
            link_or_copy(folder / STUDENT.get(component, component), new / component)
        _write_index(new, "LatentConsistencyModelPipeline")
        _replace(new, student)


def link_or_copy(origin: Path, target: Path) -> None:
    """A symlink where the file system has them, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(origin.resolve(), target_is_directory=origin.is_dir())
    except OSError:
        (shutil.copytree if origin.is_dir() else shutil.copyfile)(origin, target)


def _write_index(folder: Path, pipeline: str) -> None:
    index: dict[str, Any] = {"_class_name": pipeline, "requires_safety_checker": False}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    for component, (library, file, key) in COMPONENTS.items():
        named = json.loads((folder / component / file).read_text(encoding="utf-8"))[key]
        index[component] = [library, named[0] if isinstance(named, list) else named]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _replace(new: Path, folder: Path) -> None:
    """Move a new folder into place; an older version goes first, for a folder cannot be replaced in one step."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(new, folder)
