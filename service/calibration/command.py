"""`headstart cache calibrate`: from the command line to a policy file and a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache.latent.policy import Policy
from service.calibration.pairs import MIN_PAIRS, Embed
from service.config import Settings, version
from service.errors import SetupError
from service.evaluation.material import SCORER, Material, open_material
from service.evaluation.prompts import TWINS
from service.oneshot import say


def run(chosen: argparse.Namespace, settings: Settings) -> tuple[Policy, str]:
    """Measure and write the policy to `chosen.out`; the policy, and the table.

    `chosen` has prompts (None: those of the scorer's folder), alpha, pairs (of each bin), seed, out and quiet.

    Raises:
        ModelError, SetupError: the caller can mend it.
        NonFiniteError: the network returned what is not a number.
    """
    if not 0 < chosen.alpha <= 1:
        raise SetupError(f"--alpha: {chosen.alpha} is not allowed; above 0 and at most 1")
    if chosen.pairs < MIN_PAIRS:
        raise SetupError(f"--pairs: {chosen.pairs} is not allowed; at least {MIN_PAIRS}")
    material = open_material(settings.model, chosen.prompts, seed=chosen.seed)
    records = [prompt.record for prompt in material.prompts if prompt.record["group"] != TWINS]
    if len(records) < 2:
        raise SetupError(f"{material.path}: has fewer than two prompts")
    say(f"loading {settings.model.model}", chosen.quiet)
    from models.diffusion.loading import load_model  # seconds, for torch and diffusers
    from service.calibration.calibrate import calibrate

    model = load_model(
        settings.model.model,
        revision=settings.model.revision,
        dtype=settings.model.dtype,
        device=settings.model.device,
        cache_dir=settings.model.cache_dir,
    )
    card = model.card
    if card.max_prompt_tokens is None:
        raise SetupError(f"--model: {card.name} takes no prompts, and without them nothing is similar")
    policy = calibrate(
        model,
        material.scorer,
        _embed(Path(card.source), material),
        records,
        target=chosen.alpha,
        per_bin=chosen.pairs,
        seed=chosen.seed,
        batch=max(1, settings.engine.max_batch // 2),  # guided pictures take two network rows
        quiet=chosen.quiet,
    )
    policy = replace(
        policy,
        figures={
            "headstart": version(),
            "model": f"{card.name}@{card.revision}",
            "scorer": material.home.name,
            "prompts": material.path.name,
            **policy.figures,
        },
    )
    try:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        policy.save(chosen.out)
    except OSError as error:
        raise SetupError(f"--out: {chosen.out} cannot be written: {error.strerror}") from None
    return policy, f"{table(policy)}\n\nwritten to {chosen.out}"


def _embed(folder: Path, material: Material) -> Embed:
    """As a server's cache embeds the prompts of the model in `folder`: by a scorer only if it is the model's own."""
    if (folder / SCORER).is_dir():
        return lambda prompts: material.scorer.embed_text(prompts).cpu().numpy()
    from models.scorer.embedder import load_embedder

    return load_embedder(None, material.home / "text_encoder", material.home / "tokenizer").embed


def table(policy: Policy) -> str:
    """Quality by similarity and row, and what the policy allows, a Markdown table a family of samplers.

    Two where pictures of one prompt were too much alike: without fresh noise, and with what the policy asks for.
    """
    parts = []
    for measured in policy.figures["families"].values():
        sampler = f"{measured['sampler']}, {measured['steps']} steps, guidance {measured['guidance_scale']:g}"
        parts += [f"{sampler}, {_share(each['fresh'])}\n\n{_qualities(each)}" for each in measured["measured"]]
        parts.append(f"{sampler}: {_diversity(measured['diversity'])}")
    note = f"Quality in percent of that from scratch; allowed is what keeps {100 * (policy.target or 0):g}%."
    return "\n\n".join([*parts, note])


def _qualities(measured: Mapping[str, Any]) -> str:
    rows = list(measured["starts"])
    lines = [["similarity", "pairs", "from scratch: score, all", *(f"K = {row}" for row in rows), "allowed", "skipped"]]
    lines.append(["---"] * len(lines[0]))
    ends: list[float | None] = [*(bin["similarity"] for bin in measured["bins"][1:]), None]
    for bin, end in zip(measured["bins"], ends, strict=True):
        low = bin["similarity"]
        lines.append(
            [
                f"below {end:g}" if low == -1 else f"{low:g} to {1 if end is None else end:g}",
                str(bin["pairs"]),
                _scratch(bin["rows"].get(0, {})),
                *(_percent(bin["rows"].get(row, {}).get("quality")) for row in rows),
                "-" if bin["allowed"] is None else str(bin["allowed"]),
                str(bin["skipped"]),
            ]
        )
    return "\n".join(map(_line, lines))


def _diversity(measured: Mapping[str, Any]) -> str:
    title = (
        f"mean distance among {measured['pictures']} pictures of a prompt asked again, {measured['prompts']} prompts; "
        f"from scratch {measured['scratch']:.4f}"
    )
    if not measured["shares"]:
        return f"{title}\n\nA prompt asked again is drawn from scratch."
    lines = [["fresh noise", "latent of row", "enters at row", "distance", "of that from scratch"]]
    lines.append(["---"] * len(lines[0]))
    for each in measured["shares"]:
        level, row = (str(each["start"][name]) if each["start"] else "-" for name in ("level", "row"))
        share = f"{100 * each['fresh']:.0f}%"
        lines.append([share, level, row, f"{each['distance']:.4f}", f"{100 * each['ratio']:.1f}%"])
    return f"{title}\n\n" + "\n".join(map(_line, lines))


def _share(fresh: float) -> str:
    return f"{100 * fresh:.0f}% fresh noise" if fresh else "no fresh noise"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _scratch(found: dict[str, Any]) -> str:
    return ", ".join(f"{found[metric]:.3f}" for metric in ("score", "all") if metric in found) or "-"
