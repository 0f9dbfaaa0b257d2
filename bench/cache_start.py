"""What a picture loses that starts from another prompt's half-denoised latent, by starting row and kind of prompt.

    python bench/cache_start.py [--pairs 100] [--device cuda] [-o out/cache-start.json]

The first prompt of a pair is drawn with 50 DDIM steps and its latent kept at every row K; the second, with another
seed, is drawn from the latent at K on, and judged. At K = 0 it starts from its own noise. Then the same with LCM at
4 steps, from its inner rows. Pairs are made from the bundle's evaluation prompts: the same prompt; one word changed,
for a background's or an object's colour, for the object nearest in meaning or for another one; the same in other
words; nothing in common. Scores are in percent of those at K = 0, and "all right" is the share of pictures without a
fault.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from engine import describe

from models.diffusion.dtype import resolve_device
from models.diffusion.loading import load_model
from models.diffusion.model import DiffusionModel
from models.scorer import Scorer
from models.scorer.embedder import load_embedder
from service.calibration.drawing import Drawing, judged
from service.calibration.edits import swapped
from service.calibration.pairs import SEED_STEP
from service.config import ModelSettings
from service.evaluation.material import open_material
from service.evaluation.prompts import TWINS, Record
from service.events import MAX_SEED

STARTS = {"ddim": (50, (0, 5, 10, 15, 20, 25, 30, 35)), "lcm": (4, (0, 1, 2, 3))}  # sampler: steps, rows K
CPU_PAIRS = 1  # of each kind: 4,000 network evaluations in all


class Pair(NamedTuple):
    first: Record
    second: Record


def make_pairs(records: Sequence[Record], scorer: Scorer, likeness: torch.Tensor, count: int) -> dict[str, list[Pair]]:
    """Up to `count` pairs of each kind, spread over the records, the same for the same records.

    Args:
        likeness: [M, M] cosines of the scorer's concepts with one another.
    """
    words = scorer.vocabulary
    places = {name: place for place, name in enumerate(words.names)}
    nearest = likeness.clone().fill_diagonal_(-1).argmax(1).tolist()
    by_id = {record["id"]: record for record in records}
    own = [record for record in records if record["group"] != TWINS]
    single = [record for record in own if len(record["objects"]) == 1 and record["objects"][0]["count"] == 1]
    kinds: dict[str, list[Pair]] = {
        "same prompt": [Pair(record, record) for record in single],
        "colour of the background": [
            Pair(record, _recoloured(record, _other(words.colours, record["background"]["colours"][0])))
            for record in single
            if record["background"] and record["background"]["ground"] == "plain" and record["background"]["colours"]
        ],
        "colour of the object": [
            Pair(record, _renamed(record, "colour", _other(words.tints[1:], record["objects"][0]["colour"])))
            for record in single
            if record["objects"][0]["colour"]
        ],
        "near object": [
            Pair(record, _renamed(record, "concept", words.names[nearest[places[record["objects"][0]["concept"]]]]))
            for record in single
        ],
        "other object": [
            Pair(record, _renamed(record, "concept", _other(words.names, record["objects"][0]["concept"])))
            for record in single
        ],
        "other words": [Pair(by_id[record["twin"]], record) for record in own if record["twin"]],
        "nothing in common": [
            Pair(record, other)
            for record, other in zip(single, single[len(single) // 2 :] + single, strict=False)
            if record["objects"][0]["concept"] != other["objects"][0]["concept"]
        ],
    }
    for kind, pairs in kinds.items():
        fit = [pair for pair in pairs if kind == "same prompt" or pair.first["prompt"] != pair.second["prompt"]]
        number = min(count, len(fit))
        spread = [fit[i * len(fit) // number] for i in range(number)]
        kinds[kind] = [pair._replace(second=_reseeded(pair.second, pair.first["seed"])) for pair in spread]
    return {kind: pairs for kind, pairs in kinds.items() if pairs}


def _other(words: Sequence[str], word: str) -> str:
    return words[(words.index(word) + len(words) // 2) % len(words)]


def _recoloured(record: Record, colour: str) -> Record:
    background = record["background"]
    prompt = swapped(record["prompt"], background["colours"][0], colour)
    return record | {"prompt": prompt, "background": background | {"colours": [colour]}}


def _renamed(record: Record, field: str, word: str) -> Record:
    thing = record["objects"][0]
    return record | {"prompt": swapped(record["prompt"], thing[field], word), "objects": [thing | {field: word}]}


def _reseeded(record: Record, seed: int) -> Record:
    return record | {"seed": (seed + SEED_STEP) % (MAX_SEED + 1)}


def averaged(verdicts: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Mean score, and the share of each metric of the records that say something of it."""
    told = {metric: [value for value in values if value is not None] for metric, values in verdicts.items()}
    return {metric: sum(values) / len(values) for metric, values in told.items() if values}


def measure(
    model: DiffusionModel, scorer: Scorer, pairs: Mapping[str, Sequence[Pair]], sampler: str, batch: int
) -> dict[str, dict[int, dict[str, Any]]]:
    """Kind -> K -> figures of the second pictures."""
    steps, starts = STARTS[sampler]
    drawing = Drawing(model, sampler, steps, batch)
    firsts = list({_key(pair.first): pair.first for members in pairs.values() for pair in members}.values())
    latents = drawing.run(firsts, drawing.noise(firsts), 0, starts)
    places = {_key(record): place for place, record in enumerate(firsts)}
    figures: dict[str, dict[int, dict[str, Any]]] = {}
    for kind, members in pairs.items():
        seconds = [pair.second for pair in members]
        chosen = torch.tensor([places[_key(pair.first)] for pair in members], device=model.device)
        for start in starts:
            begun = latents[start][chosen] if start else drawing.noise(seconds)
            drawn = drawing.run(seconds, begun, start)[steps]
            figures.setdefault(kind, {})[start] = averaged(judged(model, scorer, drawn, seconds))
    return figures


def _key(record: Record) -> tuple[str, int]:
    return record["prompt"], record["seed"]


def print_table(
    title: str, starts: Sequence[int], rows: Mapping[str, Sequence[str]], cosines: Mapping[str, str]
) -> None:
    print(f"\n{title}\n")
    print("| pair | pairs | cosine | " + " | ".join(f"K = {start}" for start in starts) + " |")
    print("|" + " --- |" * (len(starts) + 3))
    for kind, cells in rows.items():
        print(f"| {kind} | {cosines[kind]} | " + " | ".join(cells) + " |", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--pairs", type=int, help=f"of each kind; default: 100, but {CPU_PAIRS} on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=16, help="pictures of one network call")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/cache-start.json"))
    options = parser.parse_args()
    settings = ModelSettings(model=options.model, device=options.device, dtype=options.dtype)
    device = resolve_device(options.device)
    count = options.pairs or (CPU_PAIRS if device.type == "cpu" else 100)
    material = open_material(settings)
    scorer = material.scorer
    # Not the scorer's own text side: the cosines of the table are of the plain encoder's sentences.
    sentences = load_embedder(None, material.home / "text_encoder", material.home / "tokenizer")
    names = torch.from_numpy(sentences.embed(scorer.vocabulary.names))
    records = [prompt.record for prompt in material.prompts if prompt.record["objects"]]
    pairs = make_pairs(records, scorer, names @ names.T, count)
    model = load_model(options.model, dtype=options.dtype, device=options.device, cache_dir=settings.cache_dir)
    print(f"{model.card.name}, {describe(device)}, {model.dtype}")
    cosines = {}
    for kind, members in pairs.items():
        first, second = (sentences.embed([pair[side]["prompt"] for pair in members]) for side in (0, 1))
        cosines[kind] = f"{len(members)} | {(first * second).sum(1).mean():.3f}"
    results = {}
    for sampler, (steps, starts) in STARTS.items():
        if sampler not in model.card.samplers:
            continue
        figures = results[sampler] = measure(model, scorer, pairs, sampler, options.batch)
        title = f"{sampler}, {steps} steps, guidance {model.card.samplers[sampler].guidance_scale:g}"
        score = {
            kind: [f"{100 * found[start]['score'] / found[0]['score']:.1f}" for start in starts]
            for kind, found in figures.items()
        }
        right = {kind: [f"{100 * found[start]['all']:.1f}" for start in starts] for kind, found in figures.items()}
        print_table(f"{title}: score, % of that at K = 0", starts, score, cosines)
        print_table(f"{title}: all right, %", starts, right, cosines)
    listed = {kind: [[record["prompt"] for record in pair] for pair in members] for kind, members in pairs.items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"pairs": listed, "figures": results}, indent=1) + "\n")
    print(f"\n{options.output} has every metric, and the prompts")


if __name__ == "__main__":
    main()
