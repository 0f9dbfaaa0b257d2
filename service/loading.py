"""The image model that settings name, loaded: by rank 0 and its followers alike."""

from __future__ import annotations

from models.diffusion.loaded import LoadedModel
from models.diffusion.loading import load_model
from service.config import ModelSettings


def load_chosen(chosen: ModelSettings) -> LoadedModel:
    """Raises ModelError."""
    return load_model(
        chosen.model,
        revision=chosen.revision,
        dtype=chosen.dtype,
        device=chosen.device,
        loras=chosen.loras,
        cache_dir=chosen.cache_dir,
    )
