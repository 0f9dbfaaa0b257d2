"""Checking a bundle's files against its manifest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from models.bundles.manifest import BundleFile, FileSource, Manifest, sha256
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


def check_fetched(manifest: Manifest, source: FileSource, folder: Path) -> None:
    """ModelError unless a source's files are whole; the one at fault is removed, so that it is fetched again."""
    for file in manifest.fetched(source.name):
        if (fault := first_fault([file], folder)) is not None:
            (folder / file.path).unlink(missing_ok=True)
            raise ModelError(f"bundle {manifest.name}: {fault}; it was removed, pull again")
