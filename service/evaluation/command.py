"""`headstart eval`: from the command line to a table and files."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from service.config import Settings, version
from service.diffusion.request import Draft, parse_size
from service.errors import SetupError
from service.evaluation.material import SCORER, open_material
from service.evaluation.metrics import parse_metrics
from service.evaluation.report import Folder, table
from service.events import MAX_SEED
from service.oneshot import Lora, say


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
    material = open_material(
        settings.model, chosen.prompts, seed=chosen.seed, limit=chosen.limit, metrics=metrics or ()
    )
    folder = Folder(chosen.out, pictures=chosen.pictures, sheet=chosen.sheet)
    say(f"the scorer is that of {material.home.name}", chosen.quiet)
    say(f"loading {settings.model.model}", chosen.quiet)
    from service.evaluation.drawing import open_easel  # seconds, for torch
    from service.evaluation.evaluate import evaluate

    with open_easel(settings, chosen.cache) as easel:
        card = easel.runtime.card
        if card.max_prompt_tokens is None:
            raise SetupError(f"--model: {card.name} takes no prompts, and without them there is nothing to judge by")
        evaluation = evaluate(
            easel,
            material.scorer,
            material.prompts,
            template,
            metrics=metrics,
            reference=material.reference,
            keep=functools.partial(folder.keep, card.name),
            quiet=chosen.quiet,
        )
    results = {
        "headstart": version(),
        "model": {"name": card.name, "revision": card.revision, "source": card.source},
        "scorer": str(material.home / SCORER),
        "prompts": {"file": str(material.path), "limit": chosen.limit, "seed": chosen.seed},
        "engine": {
            "dtype": settings.model.dtype,
            "device": str(material.scorer.device),
            "max_batch": settings.engine.max_batch,
            "max_running": settings.engine.max_running,
        },
        **evaluation.as_json(),
    }
    folder.finish(evaluation, results)
    return results, table(card.name, evaluation, metrics)


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
