"""Checking a bundle's files against its manifest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from models.bundles.manifest import BundleFile, Manifest, sha256
from models.errors import ModelError


def first_fault(files: Iterable[BundleFile], folder: Path) -> str | None:
    """What is wrong with the first file that is missing, cut short or altered; None if all are right."""
    for file in files:
        path = folder / file.path
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != file.size:
            return f"{path} has {size} bytes, {file.size} are expected"
        if sha256(path) != file.sha256:
            return f"{path} is altered: its sha256 is not {file.sha256}"
    return None


def check_own(manifest: Manifest, root: Path) -> None:
    """ModelError unless the bundle's own files are whole."""
    fault = first_fault((file for file in manifest.files if file.source is None), root)
    if fault is not None:
        raise ModelError(f"bundle {manifest.name} came damaged: {fault}")
