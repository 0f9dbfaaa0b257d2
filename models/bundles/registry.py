"""The bundles that come with Headstart, by the names users call them.

Nothing here prints: progress goes to a callback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from models.bundles.assemble import assemble, assembled_folder, is_assembled
from models.bundles.fetch import Progress, fetch, fetched_folder, ignore_progress
from models.bundles.manifest import LANGUAGE, Manifest, read_manifest
from models.bundles.verify import check_own, first_fault
from models.errors import ModelError

Roots = Mapping[str, Path]
HERE = Path(__file__).parent
ROOTS: Roots = {"default": HERE / "headstart-v1", "smollm2": HERE / "smollm2-135m-instruct"}


@dataclass(frozen=True, slots=True)
class BundleStatus:
    """A bundle as `headstart models list` shows it."""

    name: str
    manifest: Manifest
    pulled: bool


def list_bundles(cache_dir: Path, *, roots: Roots = ROOTS) -> list[BundleStatus]:
    """Every bundle and whether it is ready to be loaded."""
    manifests = {name: read_manifest(root) for name, root in roots.items()}
    return [
        BundleStatus(name, manifest, is_assembled(manifest, roots[name], cache_dir))
        for name, manifest in manifests.items()
    ]


def bundle_path(name: str, cache_dir: Path, *, roots: Roots = ROOTS) -> Path:
    """The folder of a bundle that has been pulled: in diffusers' format, or with the file of a language model.

    ModelError tells to pull it otherwise.
    """
    root = _root(name, roots)
    manifest = read_manifest(root)
    if not is_assembled(manifest, root, cache_dir):
        raise ModelError(f"bundle {name!r} is not in {cache_dir}: run `headstart models pull`")
    return assembled_folder(manifest, cache_dir)


def pull(name: str, cache_dir: Path, progress: Progress = ignore_progress, *, roots: Roots = ROOTS) -> Path:
    """Make a bundle ready to load: fetch what it does not hold itself, check it, lay out its folder; convert a language
    model's file into what loads fast.

    Safe to run twice, and in two processes at once; uses no network when everything is there and undamaged.

    Args:
        progress: called with (what, bytes done, bytes in all) while a file is fetched.

    Returns:
        The folder to load from.

    Raises:
        ModelError: a file of the bundle itself is damaged, one cannot be fetched, or the cache cannot be written.
    """
    root = _root(name, roots)
    manifest = read_manifest(root)
    folder = assembled_folder(manifest, cache_dir)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            check_own(manifest, root)
            for source in manifest.sources.values():
                if first_fault(manifest.fetched(source.name), fetched_folder(source, cache_dir)) is not None:
                    fetch(manifest, source, cache_dir, progress)
            if not is_assembled(manifest, root, cache_dir):
                assemble(manifest, root, cache_dir)
        if manifest.kind == LANGUAGE:
            language_folder(name, cache_dir, roots=roots)
    except OSError as error:
        raise ModelError(f"bundle {name!r} cannot be put into {cache_dir}: {error}") from None
    return folder


def language_folder(name: str, cache_dir: Path, *, roots: Roots = ROOTS) -> Path:
    """The folder in transformers' format of a language model that has been pulled."""
    from models.llm.gguf import converted_folder  # here, because it takes torch

    folder = bundle_path(name, cache_dir, roots=roots)
    (file,) = read_manifest(_root(name, roots)).files
    return converted_folder(folder / file.path, cache_dir, file.sha256)


def verify(name: str, cache_dir: Path, *, roots: Roots = ROOTS) -> Manifest:
    """Check the size and digest of every file; ModelError names the first that is wrong."""
    manifest = read_manifest(_root(name, roots))
    folder = assembled_folder(manifest, cache_dir)
    fault = first_fault(manifest.files, folder) if folder.exists() else None
    if fault is not None:
        raise ModelError(f"bundle {name!r}: {fault}; run `headstart models pull`")
    bundle_path(name, cache_dir, roots=roots)
    return manifest


def _root(name: str, roots: Roots) -> Path:
    if name not in roots:
        raise ModelError(f"there is no bundle {name!r}; there are: {', '.join(roots)}")
    return roots[name]
