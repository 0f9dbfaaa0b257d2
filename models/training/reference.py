"""What drawn pictures are measured against: the evaluation prompts, and what the scorer says of their real renders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from models.scorer import Scorer, Statistics, frechet
from models.scorer.scorer import Reading
from models.training.captions import CaptionWriter
from models.training.export import write_metrics
from models.training.prompts import records, scenes_of, write_records
from models.training.scenes import Stage
from models.training.vae import decode, moments

PROMPTS, REFERENCE, CEILINGS = "held-out.jsonl", "reference.safetensors", "reference.json"
_SEED = 7
_RENDERS = 5  # of each prompt, for the statistics; another one is measured against them
_CHUNK = 128


def shares(
    verdicts: Mapping[str, Sequence[Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, float]]]:
    """By group, and over all but the twins: metric -> {"share", "n"} of the pictures whose record says something of it.

    Args:
        verdicts: metric -> True, False or None for each record; "score" is left to its mean.
    """
    out = {}
    for group in ["overall", *dict.fromkeys(row["group"] for row in rows)]:
        here = [
            i for i, row in enumerate(rows) if row["group"] == group or (group == "overall" != row["group"] != "twins")
        ]
        figures: dict[str, dict[str, float]] = {}
        for metric, values in verdicts.items():
            said = [float(values[i]) for i in here if values[i] is not None]
            if said:
                figures[metric] = {"share": sum(said) / len(said), "n": len(said)}
        out[group] = figures
    return out


@torch.no_grad()
def _renders(stage: Stage, rows: Sequence[dict[str, Any]], side: int, vae: AutoencoderKL | None) -> torch.Tensor:
    """Real renders [N, 3, side, side] of records, through `vae` if one is given; on the CPU, to save the device."""
    scenes = scenes_of(rows, stage)
    out = []
    for start in range(0, len(rows), _CHUNK):
        pictures = stage.compose(scenes[slice(start, start + _CHUNK)], side)
        if vae is not None:
            pictures = decode(vae, moments(vae, pictures)[0]).clamp(-1, 1)
        out.append(pictures.cpu())
    return torch.cat(out)


def _read(scorer: Scorer, pictures: torch.Tensor) -> Reading:
    return Reading.cat([scorer.read(part) for part in pictures.split(_CHUNK)])


def make_reference(
    folder: Path, stage: Stage, writer: CaptionWriter, scorer: Scorer, vae: AutoencoderKL, side: int
) -> dict[str, Any]:
    """Write the evaluation prompts, the statistics of real renders, and the ceilings; returns the ceilings.

    `writer` writes wordings kept out of training too. The ceilings are what the scorer says of real renders, and of
    real renders that have been through the VAE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(_SEED)
    rows = records(stage, writer, _SEED)
    write_records(folder / PROMPTS, rows)
    measured = [row for row in rows if row["group"] != "twins"]
    features = [_read(scorer, _renders(stage, measured, side, None)).features for _ in range(_RENDERS)]
    statistics = Statistics.of(torch.cat(features))
    statistics.save(folder / REFERENCE)
    ceilings: dict[str, Any] = {}
    for name, through in (("real renders", None), ("real renders through the VAE", vae)):
        pictures = _renders(stage, rows, side, through)
        reading = _read(scorer, pictures)
        others = torch.tensor([row["group"] != "twins" for row in rows])
        ceilings[name] = {
            "groups": shares(scorer.judge(reading, rows), rows),
            "frechet": frechet(reading.features.cpu()[others], statistics),
        }
    write_metrics(folder / CEILINGS, ceilings)
    return ceilings
