"""How well and how fast few steps draw: every sampler of the default model at several numbers of steps.

    python bench/few_steps.py [--limit 100] [--device cuda] [-o out/few-steps.json]

A row is an evaluation as `headstart eval` makes it: the LCM student, every LoRA that makes a student of the teacher,
the consistency model, and the teacher with DDIM, Euler and DPM++ 2M, each with its own guidance. The first rows are
real renders through the same scorer. Shares are in percent; seconds are those of drawing many at once, by the clock.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import describe

from models.diffusion.dtype import resolve_device
from models.diffusion.folder import read_json
from models.diffusion.model import ModelCard
from service.config import EngineSettings, ModelSettings, Settings
from service.diffusion.request import Draft
from service.evaluation.drawing import open_easel
from service.evaluation.evaluate import evaluate
from service.evaluation.material import open_material
from service.evaluation.metrics import SHARES

CEILINGS = Path("eval", "reference.json")
FEW, MANY = (1, 2, 4, 8), (4, 8, 20, 50)
SOLVERS = ("ddim", "euler", "dpmpp_2m")
CPU_LIMIT = 10  # 540 network evaluations a prompt


def contenders(card: ModelCard) -> list[tuple[str, Draft]]:
    """What the model has of all that the table compares: a name and the settings of each row."""
    found: list[tuple[str, dict[str, Any], tuple[int, ...]]]
    found = [(sampler, {"sampler": sampler}, FEW) for sampler in ("lcm", "consistency")]
    found += [
        (f"{student.sampler}, {name}", {"sampler": student.sampler, "loras": ((name, 1.0),)}, FEW)
        for name, student in card.student_loras.items()
    ]
    found += [(sampler, {"sampler": sampler}, MANY) for sampler in SOLVERS]
    return [
        (name, Draft(prompt="", num_inference_steps=steps, **settings))
        for name, settings, counts in found
        if settings["sampler"] in card.samplers
        for steps in counts
    ]


def cells(figures: Mapping[str, Any], frechet: float | None) -> list[str]:
    """Score, shares and Frechet distance."""
    score = figures["score"]
    shares = (figures.get(metric) for metric in SHARES)
    return [
        f"{score['share'] if isinstance(score, dict) else score:.3f}",  # the ceilings have it as a share
        *("-" if share is None else f"{100 * share['share']:.1f}" for share in shares),
        "-" if frechet is None else f"{frechet:.3g}",
    ]


def print_row(row: list[str]) -> None:
    print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--limit", type=int, help=f"prompts, spread over all; default: all, but {CPU_LIMIT} on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-batch", type=int, default=16, help="network rows of one call")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/few-steps.json"))
    options = parser.parse_args()
    chosen = ModelSettings(model=options.model, device=options.device, dtype=options.dtype)
    engine = EngineSettings(max_batch=options.max_batch, max_running=2 * options.max_batch)
    limit = options.limit or (CPU_LIMIT if resolve_device(options.device).type == "cpu" else None)
    material = open_material(chosen, limit=limit)
    ceilings = read_json(material.home / CEILINGS) if (material.home / CEILINGS).is_file() else {}
    results: dict[str, Any] = {"ceilings": ceilings, "rows": []}
    with open_easel(Settings(model=chosen, engine=engine)) as easel:
        card = easel.runtime.card
        print(f"{card.name}, {describe(material.scorer.device)}, {len(material.prompts)} prompts\n")
        print_row(["sampler", "steps", "guidance", "score", *SHARES, "Frechet", "evaluations", "s a picture"])
        print_row(["---"] * (len(SHARES) + 7))
        for name, found in ceilings.items():
            print_row([name, "-", "-", *cells(found["groups"]["overall"], found["frechet"]), "-", "-"])
        for name, template in contenders(card):
            evaluation = evaluate(easel, material.scorer, material.prompts, template, reference=material.reference)
            row = evaluation.as_json()
            results["rows"].append({"name": name, **row})
            drawn = row["settings"]
            print_row(
                [
                    name,
                    str(drawn["steps"]),
                    f"{drawn['guidance_scale']:g}",
                    *cells(row["overall"], row["frechet"]),
                    f"{row['evaluations_per_picture']:g}",
                    f"{row['seconds_per_picture']:.3g}",
                ]
            )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{options.output} has every group's figures")


if __name__ == "__main__":
    main()
