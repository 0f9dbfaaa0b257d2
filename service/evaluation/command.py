"""`headstart eval`: from the command line to a table and files."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.bundles.registry import ROOTS, bundle_path
from service.config import ModelSettings, Settings, version
from service.diffusion.request import MAX_SEED, Draft, parse_size
from service.errors import SetupError
from service.evaluation.metrics import FRECHET, check_metrics, parse_metrics
from service.evaluation.prompts import check_names, read_prompts, sample
from service.evaluation.report import Folder, table
from service.oneshot import Lora, say

# In the folder of a bundle.
SCORER = Path("scorer")
PROMPTS = Path("eval", "held-out.jsonl")
REFERENCE = Path("eval", "reference.safetensors")


def run(chosen: argparse.Namespace, settings: Settings, loras: Sequence[Lora]) -> tuple[dict[str, Any], str]:
    """Draw, judge and write; the results, fit for JSON, and the table.

    Raises:
        ModelError, InputError, SetupError: the caller can mend it.
        HeadstartError: drawing failed.
    """
    metrics = parse_metrics(chosen.metrics)
    if chosen.limit is not None and chosen.limit < 1:
        raise SetupError(f"--limit: {chosen.limit} is not allowed; at least 1")
    if not 0 <= chosen.seed <= MAX_SEED:
        raise SetupError(f"--seed: {chosen.seed} is not allowed; 0 to {MAX_SEED}")
    template = _template(chosen, loras)
    home = scorer_home(settings.model)
    path = chosen.prompts or home / PROMPTS
    prompts = sample(read_prompts(path, chosen.seed), chosen.limit)
    check_metrics(path, prompts, metrics or ())
    if FRECHET in (metrics or ()) and not (home / REFERENCE).is_file():
        raise SetupError(f"metric frechet needs {home / REFERENCE}, which is not there")
    folder = Folder(chosen.out, pictures=chosen.pictures, sheet=chosen.sheet)

    say(f"loading the scorer of {home.name}", chosen.quiet)
    from models.diffusion.dtype import resolve_device  # seconds, for torch and open_clip
    from models.scorer import Statistics, load_scorer
    from service.evaluation.drawing import open_easel
    from service.evaluation.evaluate import evaluate

    device = resolve_device(settings.model.device)
    scorer = load_scorer(home / SCORER, home / "text_encoder", home / "tokenizer", device)
    check_names(path, prompts, scorer.vocabulary)
    reference = Statistics.load(home / REFERENCE) if (home / REFERENCE).is_file() else None
    say(f"loading {settings.model.model}", chosen.quiet)
    with open_easel(settings) as easel:
        card = easel.runtime.card
        if card.max_prompt_tokens is None:
            raise SetupError(f"--model: {card.name} takes no prompts, and without them there is nothing to judge by")
        evaluation = evaluate(
            easel,
            scorer,
            prompts,
            template,
            metrics=metrics,
            reference=reference,
            keep=functools.partial(folder.keep, card.name),
            quiet=chosen.quiet,
        )
    results = {
        "headstart": version(),
        "model": {"name": card.name, "revision": card.revision, "source": card.source},
        "scorer": str(home / SCORER),
        "prompts": {"file": str(path), "limit": chosen.limit, "seed": chosen.seed},
        "engine": {
            "dtype": settings.model.dtype,
            "device": str(device),
            "max_batch": settings.engine.max_batch,
            "max_running": settings.engine.max_running,
        },
        **evaluation.as_json(),
    }
    folder.finish(evaluation, results)
    return results, table(card.name, evaluation, metrics)


def scorer_home(settings: ModelSettings) -> Path:
    """The folder whose scorer, prompts and reference are used: the model's own, or else the default bundle's."""
    if settings.model not in ROOTS:
        own = Path(settings.model).expanduser()
        if (own / SCORER).is_dir():
            return own
    return bundle_path(settings.model if settings.model in ROOTS else "default", settings.cache_dir)


def _template(chosen: argparse.Namespace, loras: Sequence[Lora]) -> Draft:
    """The settings of every picture. Raises InputError for a size that is none."""
    width = height = None
    if chosen.size is not None:
        width, height = parse_size("--size", chosen.size, "WIDTHxHEIGHT, such as 256x256")
    return Draft(
        prompt="",
        width=width,
        height=height,
        num_inference_steps=chosen.steps,
        guidance_scale=chosen.guidance,
        sampler=chosen.sampler,
        loras=tuple((lora.name, lora.scale) for lora in loras),
    )
