"""A bundle's training figures as tables:  python -m models.training.report models/bundles/headstart-v1/manifest.json"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STAGES = {"vae": "VAE", "teacher": "teacher", "lcm": "LCM student"}


def report(training: Mapping[str, Any]) -> str:
    """Markdown of a manifest's "training" object: the stages, the pictures judged, and what float16 changes."""
    return "\n\n".join([_stages(training), _vae(training["vae"]), _judged(training["evaluation"]), _float16(training)])


def _stages(training: Mapping[str, Any]) -> str:
    rows = []
    for stage, name in STAGES.items():
        row = training[stage]
        speed = f"{row['pictures_per_second']:,.0f}"
        loss = f"{row['first_loss']:.4g} → {row['last_loss']:.4g}"
        rows.append((name, f"{row['parameters_m']:.2f} M", f"{row['steps']:,}", f"{row['pictures']:,}", speed, loss))
    return _table(("network", "parameters", "steps", "pictures", "pictures/s", "loss, first → last"), rows)


def _vae(row: Mapping[str, float]) -> str:
    return (
        f"VAE on fresh scenes: PSNR {row['psnr']:.2f} dB from the posterior's mean, {row['psnr_sampled']:.2f} dB from "
        f"a sample of it,\n{row['psnr_latent_noise_0.1']:.2f} dB with noise of deviation 0.1 on the latents."
    )


def _judged(evaluation: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row for each kind of prompt, a column for each source of pictures: objects right % / colours right %."""
    groups = list(dict.fromkeys(group for results in evaluation.values() for group in results))
    rows = []
    for group in groups:
        scores = [results.get(group) for results in evaluation.values()]
        count = next(score["n"] for score in scores if score)
        rows.append((group, f"{count:g}", *(_score(score) for score in scores)))
    return _table(("objects % / colours %", "n", *evaluation), rows)


def _score(score: Mapping[str, float] | None) -> str:
    return f"{score['concept']:.1f} / {score['colour']:.1f}" if score else ""


def _float16(training: Mapping[str, Any]) -> str:
    """Relative errors against the float32 network; arithmetic is measured where there is a GPU."""
    rows = []
    for part in ("unet", "unet_lcm"):
        values = training["export"][part]
        arithmetic = values.get("float16_arithmetic_error")
        rows.append((part, f"{values['float16_weights_error']:.1e}", f"{arithmetic:.1e}" if arithmetic else ""))
    return _table(("relative error", "float16 weights", "float16 arithmetic"), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = tuple(head)
    lines = [names, ("---", *["---:"] * (len(names) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a bundle's training figures as Markdown.")
    parser.add_argument("manifest", type=Path)
    path = parser.parse_args().manifest
    print(report(json.loads(path.read_text(encoding="utf-8"))["training"]))


if __name__ == "__main__":
    main()
