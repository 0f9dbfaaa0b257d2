"""A bundle's figures as tables:  python -m models.training.report models/bundles/headstart-v1/manifest.json"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NETWORKS = {
    "vae": "VAE",
    "scorer": "scorer",
    "teacher": "teacher",
    "lcm": "LCM student",
    "lcm-lora": "LCM-LoRA",
    "consistency": "consistency LoRA",
    "consistency-training": "consistency training, LoRA",
}


def report(training: Mapping[str, Any], ceilings: Mapping[str, Any] | None = None) -> str:
    """Markdown of a manifest's "training" object, and of the ceilings if they are given; shows what there is.

    Raises ValueError if `training` has no figures of any network.
    """
    stages = {name: training[name] for name in NETWORKS if isinstance(training.get(name), Mapping)}
    if not stages:
        raise ValueError(f"these are no figures of a training: none of {', '.join(NETWORKS)}")
    parts = [_stages(stages)]
    if "vae" in stages:
        parts.append(_vae(stages["vae"]))
    if "scorer" in stages:
        parts += _validation(stages["scorer"]["validation"])
    if points := {name: row["sigmas"] for name, row in stages.items() if "sigmas" in row}:
        parts.append(_time_points(points))
    if rounded := {name: row for name, row in stages.items() if "float16_weights_error" in row}:
        parts.append(_float16(rounded))
    if ceilings is not None:
        parts += [_ceilings(name, source) for name, source in ceilings.items()]
    return "\n\n".join(parts)


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for stage, row in stages.items():
        speed = f"{row['pictures_per_second']:,.0f}"
        loss = f"{row['first_loss']:.4g} → {row['last_loss']:.4g}"
        size = f"{row['parameters_m']:.2f} M"
        rows.append((NETWORKS[stage], size, f"{row['steps']:,}", f"{row['pictures']:,}", speed, loss))
    return _table(("network", "parameters", "steps", "pictures", "pictures/s", "loss, first → last"), rows)


def _vae(row: Mapping[str, float]) -> str:
    return (
        f"VAE on fresh scenes: PSNR {row['psnr']:.2f} dB from the posterior's mean, {row['psnr_sampled']:.2f} dB from "
        f"a sample of it,\n{row['psnr_latent_noise_0.1']:.2f} dB with noise of deviation 0.1 on the latents."
    )


def _validation(validation: Mapping[str, Any]) -> list[str]:
    """The scorer on held-out renders, on records with one fault each, and on spoilt pictures."""
    told = {fault: row for fault, row in validation["told wrongly"].items() if row}
    shares = [(fault, *(_percent(row[key]) for key in ("true", "wrong", "preferred"))) for fault, row in told.items()]
    return [
        _verdicts("held-out renders, right %", validation["renders"]),
        _table(("planted fault", "true record right %", "wrong record right %", "true caption preferred %"), shares),
        _verdicts("the same renders, right %", validation["pictures"]),
    ]


def _ceilings(name: str, source: Mapping[str, Any]) -> str:
    """What the scorer says of real renders of the evaluation's prompts, by group.

    In brackets stands of how many, where fewer prompts than the group has say anything of it.
    """
    groups = source["groups"]
    metrics = list(dict.fromkeys(metric for figures in groups.values() for metric in figures))
    rows = []
    for group, figures in groups.items():
        count = max(figure["n"] for figure in figures.values())
        cells = []
        for metric in metrics:
            figure = figures.get(metric)
            fewer = f" ({figure['n']})" if figure and figure["n"] < count else ""
            cells.append(_verdict(metric, figure and figure["share"]) + fewer)
        rows.append((group, f"{count:,}", *cells))
    table = _table((f"{name}, right %", "n", *metrics), rows)
    return f"{table}\n\nFréchet distance of {name}: {source['frechet']:.3f}."


def _verdicts(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each kind of picture, a column for each metric that any of them has."""
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    cells = [(kind, *(_verdict(metric, row.get(metric)) for metric in metrics)) for kind, row in rows.items()]
    return _table((title, *metrics), cells)


def _verdict(metric: str, value: float | None) -> str:
    """A share in per cent; the score, a cosine, and the Fréchet distance as they are."""
    if value is None:
        return ""
    return f"{value:.3f}" if metric in ("score", "frechet") else _percent(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _time_points(points: Mapping[str, Mapping[str, Iterable[float]]]) -> str:
    rows = [
        (NETWORKS[stage], steps, ", ".join(f"{sigma:.4g}" for sigma in sigmas))
        for stage, of_steps in points.items()
        for steps, sigmas in of_steps.items()
    ]
    return _table(("time points", "steps", "sigma"), rows)


def _float16(stages: Mapping[str, Mapping[str, float]]) -> str:
    """Relative errors against the float32 network; arithmetic is measured where there is a GPU."""
    rows = []
    for stage, row in stages.items():
        arithmetic = row.get("float16_arithmetic_error")
        rows.append((NETWORKS[stage], f"{row['float16_weights_error']:.1e}", f"{arithmetic:.1e}" if arithmetic else ""))
    return _table(("relative error", "float16 weights", "float16 arithmetic"), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = tuple(head)
    lines = [names, ("---", *["---:"] * (len(names) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a bundle's figures as Markdown.")
    parser.add_argument("manifest", type=Path)
    path = parser.parse_args().manifest
    training = json.loads(path.read_text(encoding="utf-8")).get("training", {})
    ceilings = path.parent / "eval" / "reference.json"
    known = json.loads(ceilings.read_text(encoding="utf-8")) if ceilings.exists() else None
    try:
        print(report(training, known))
    except ValueError as error:
        parser.error(f"{path}: {error}")


if __name__ == "__main__":
    main()
