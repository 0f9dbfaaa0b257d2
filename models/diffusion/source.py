"""From what a user calls a model to a folder on disk."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from models.bundles import registry
from models.bundles.assemble import assembled_folder
from models.bundles.manifest import DIFFUSION, read_manifest
from models.diffusion.folder import one_line, quiet_libraries
from models.errors import ModelError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMPONENTS = ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
CONFIGS = ("*.json", "*.txt", "*.model")
WEIGHTS = (  # plain names only: not the float16, ONNX, Flax or single-file copies that many repositories also hold
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-?????-of-?????.safetensors",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's folder lies and what to call it; `origin` is that folder, or the hub id it is a copy of."""

    name: str
    origin: str
    path: Path
    revision: str


def resolve_source(source: str, revision: str | None, cache_dir: Path) -> Source:
    """Find a bundle by name, a diffusers folder, or a hub id (fetched into cache_dir unless it is there already).

    Raises:
        ModelError: nothing answers to the name, or it cannot be had.
    """
    if source in registry.ROOTS:
        # Digests cost a quarter of a second; a flipped bit in the weights would cost wrong pictures.
        manifest = registry.verify(source, cache_dir, roots=registry.ROOTS)
        if manifest.kind != DIFFUSION:
            raise ModelError(f"bundle {source!r} is a {manifest.kind} model; it draws no pictures")
        folder = assembled_folder(manifest, cache_dir)
        return Source(manifest.name, str(folder), folder, manifest.version)
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return Source(path.resolve().name, str(path), path, "local")
    if HUB_ID.fullmatch(source) and not path.exists():
        return _fetch(source, revision, cache_dir)
    bundles = ", ".join(name for name, root in registry.ROOTS.items() if read_manifest(root).kind == DIFFUSION)
    raise ModelError(f"model {source!r} is neither a bundle ({bundles}), nor a folder, nor a hub id like owner/name")


def _fetch(hub_id: str, revision: str | None, cache_dir: Path) -> Source:
    folder = snapshot(hub_id, revision, cache_dir, ["model_index.json", *_patterns(CONFIGS), *_patterns(WEIGHTS)])
    has_weights = any(next(folder.glob(f"unet/{pattern}"), None) for pattern in WEIGHTS)
    if not has_weights:  # an old repository: only pickled weights, which are read with weights_only
        bins = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
        folder = snapshot(hub_id, revision, cache_dir, _patterns(bins))
    return Source(hub_id, hub_id, folder, folder.name)


def _patterns(names: tuple[str, ...]) -> list[str]:
    return [f"{component}/{name}" for component in COMPONENTS for name in names]


def snapshot(hub_id: str, revision: str | None, cache_dir: Path, patterns: list[str]) -> Path:
    """The part of a hub repository that matches the patterns, as a folder; its name is the commit."""
    from huggingface_hub import errors, snapshot_download

    where = f"{hub_id}@{revision}" if revision else hub_id
    try:
        with quiet_libraries():
            return Path(
                snapshot_download(hub_id, revision=revision, cache_dir=cache_dir / "hub", allow_patterns=patterns)
            )
    except errors.GatedRepoError:
        raise ModelError(f"{where} is gated: accept its licence on the hub and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{hub_id} has no revision {revision!r} on the hub") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{hub_id} is not on the hub, or is private and needs `hf auth login`") from None
    except errors.LocalEntryNotFoundError:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelError(f"{where} is not in {cache_dir / 'hub'} and the hub cannot be reached{offline}") from None
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{where} cannot be fetched from the hub: {one_line(error)}") from None
