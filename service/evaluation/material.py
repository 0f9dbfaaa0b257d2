"""What a model is judged with: a scorer, prompts, and the statistics of real renders, all of one bundle's folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from models.bundles.registry import ROOTS, bundle_path
from models.errors import ModelError
from service.config import ModelSettings
from service.errors import SetupError
from service.evaluation.metrics import FRECHET, check_metrics
from service.evaluation.prompts import Prompt, check_names, read_prompts, sample

if TYPE_CHECKING:
    from models.scorer import Scorer, Statistics

SCORER = Path("scorer")
PROMPTS = Path("eval", "held-out.jsonl")
REFERENCE = Path("eval", "reference.safetensors")


class Material(NamedTuple):
    """home: the folder of the scorer; path: the file of the prompts; reference: None where the folder has none."""

    home: Path
    path: Path
    prompts: list[Prompt]
    scorer: Scorer
    reference: Statistics | None


def open_material(
    settings: ModelSettings,
    prompts: Path | None = None,
    *,
    seed: int = 0,
    limit: int | None = None,
    metrics: Sequence[str] = (),
) -> Material:
    """Read and check the prompts, then load the scorer onto the device of the settings.

    The scorer is that of the model's own folder, or else the default bundle's.

    Args:
        prompts: None: those of the scorer's folder.
        seed: see `read_prompts`. limit: see `sample`.
        metrics: those that must be measurable.

    Raises:
        SetupError: the prompts are not what they should be.
        ModelError: there is no scorer, or it is damaged, or the statistics are of another scorer's features.
    """
    home = _home(settings)
    path = prompts or home / PROMPTS
    chosen = sample(read_prompts(path, seed), limit)
    check_metrics(path, chosen, metrics)
    if FRECHET in metrics and not (home / REFERENCE).is_file():
        raise SetupError(f"metric frechet needs {home / REFERENCE}, which is not there")
    from models.diffusion.dtype import resolve_device  # seconds, for torch and open_clip
    from models.scorer import Statistics, load_scorer

    device = resolve_device(settings.device)
    scorer = load_scorer(home / SCORER, home / "text_encoder", home / "tokenizer", device)
    check_names(path, chosen, scorer.vocabulary)
    reference = Statistics.load(home / REFERENCE) if (home / REFERENCE).is_file() else None
    if reference is not None and len(reference.mean) != scorer.sizes.width:
        raise ModelError(
            f"{home / REFERENCE} is of {len(reference.mean)} features, the scorer beside it has {scorer.sizes.width}"
        )
    return Material(home, path, chosen, scorer, reference)


def _home(settings: ModelSettings) -> Path:
    if settings.model not in ROOTS:
        own = Path(os.path.expanduser(settings.model))
        if (own / SCORER).is_dir():
            return own
    return bundle_path(settings.model if settings.model in ROOTS else "default", settings.cache_dir)
