"""How different ten cached pictures of one prompt are, against ten from scratch.

    python bench/cache_diversity.py [--prompts 24] [--sampler ddim lcm] [--policy FILE] [-o out/cache-diversity.json]

Each prompt is drawn once, and again by two requests for five pictures each, and by ten requests for one, all under
other seeds, through the engine with an empty cache in memory: with the policy (the model's own, else NIRVANA's
thresholds), and with `fresh` taken out of it; then from scratch under the same seeds. LPIPS is that of
service/calibration/diversity.py, with the scorer's image tower; pixels are the root of the mean squared difference,
from 0 to 1. Both are means over the pairs of ten, then over prompts, and the ratios are those of the means.
"different" counts pictures that are not equal byte by byte. --fresh puts another share in the place of the policy's.
On a CPU 2 prompts, and DDIM takes 10 steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_trace import TENANT, embedded, opened
from drawing import draw
from engine import describe

from cache.latent.policy import Policy, nirvana
from models.diffusion.loading import load_model
from models.diffusion.model import DiffusionModel
from models.scorer import Scorer
from service.caching import CacheStarts, family_of, levels_of
from service.calibration.diversity import PICTURES, PROMPTS, layouts, spread
from service.config import EngineSettings, ModelSettings
from service.diffusion.admission import resolve
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import CacheIntent, Draft, Image, ImageRequest
from service.evaluation.material import open_material
from service.evaluation.prompts import TWINS
from service.opening import POLICY

CPU_PROMPTS, CPU_STEPS = 2, 10
SEED = 1_000  # of the first of the ten; the picture before them has another
ASKED = {"2 requests of 5": 5, "10 requests of 1": 1}  # pictures of a request


class Stage:
    """Draws prompts again and again with one sampler."""

    def __init__(self, model: DiffusionModel, scorer: Scorer, prompts: Sequence[str], sampler: str, steps: int) -> None:
        self._model, self._scorer, self._prompts = model, scorer, prompts
        self._sampler, self._steps = sampler, steps
        self._vectors = embedded(scorer, prompts)
        self._limits = EngineSettings(max_batch=2 * PICTURES, max_running=PICTURES, max_waiting=PICTURES)

    def again(self, policy: Policy | None, n: int) -> list[list[Image]]:
        """Ten pictures of each prompt, n a request; without a policy from scratch."""
        cache = None if policy is None else opened(policy)
        starts = None if cache is None else CacheStarts(cache, self._model, "measured")
        engine = DiffusionEngine(self._model, self._limits, starts=starts)
        found = []
        for place in range(len(self._prompts)):
            if cache is not None:
                draw(engine, [self._request(place, SEED - 1, 1)], 1)
                engine.settle(60)
                cache.flush(60)
            requests = [self._request(place, SEED + at, n) for at in range(0, PICTURES, n)]
            found.append(draw(engine, requests, PICTURES))
        if cache is not None:
            cache.close()
        return found

    def figures(self, pictures: Sequence[Sequence[Image]]) -> dict[str, float]:
        """Means over prompts."""
        lpips, pixels, different = [], [], []
        for ten in pictures:
            stack = torch.from_numpy(np.stack([np.asarray(image.pixels) for image in ten])).float() / 255
            reading = self._scorer.read(stack.permute(0, 3, 1, 2) * 2 - 1)
            lpips.append(spread(layouts(reading)))
            flat = stack.flatten(1)
            pixels.append(float(torch.nn.functional.pdist(flat).mean()) / flat.shape[1] ** 0.5)
            different.append(len({np.asarray(image.pixels).tobytes() for image in ten}))
        images = [image for ten in pictures for image in ten]
        return {
            "lpips": float(np.mean(lpips)),
            "pixels": float(np.mean(pixels)),
            "different": float(np.mean(different)),
            "hits": float(np.mean([image.cache_result == "hit" for image in images])),
            "skipped": float(np.mean([image.steps_skipped for image in images])),
        }

    def _request(self, place: int, seed: int, n: int) -> ImageRequest:
        draft = Draft(
            prompt=self._prompts[place], seed=seed, sampler=self._sampler, num_inference_steps=self._steps, n=n
        )
        request = resolve(draft, self._model.card, self._limits, id=f"{place}-{seed}", random_seed=0)
        intent = CacheIntent(embedding=self._vectors[place], look=True, store=True)
        return replace(request, tenant=TENANT, cache=intent)


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n\n| ten pictures | LPIPS | ratio | pixels | ratio | different | hits | rows skipped |")
    print("|" + " --- |" * 8)
    scratch = rows["from scratch"]
    for name, row in rows.items():
        cells = [f"{row[measure]:.4f} | {row[measure] / scratch[measure]:.2f}" for measure in ("lpips", "pixels")]
        cells += [f"{row['different']:.1f}", f"{100 * row['hits']:.1f}%", f"{row['skipped']:.1f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--sampler", nargs="+", default=["ddim", "lcm"])
    parser.add_argument("--policy", type=Path, help="default: the model's own, else NIRVANA's thresholds")
    parser.add_argument("--fresh", type=float, help="the share for every family, in place of the policy's")
    parser.add_argument("--prompts", type=int, help=f"default: {PROMPTS}, but {CPU_PROMPTS} on a CPU")
    parser.add_argument("--steps", type=int, help=f"default: the sampler's own, but {CPU_STEPS} at most on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/cache-diversity.json"))
    options = parser.parse_args()
    settings = ModelSettings(model=options.model, device=options.device, dtype=options.dtype)
    material = open_material(settings)
    model = load_model(options.model, dtype=options.dtype, device=options.device, cache_dir=settings.cache_dir)
    card, on_cpu = model.card, model.device.type == "cpu"
    own = Path(card.source) / POLICY
    path = options.policy or (own if own.is_file() else None)
    policy = nirvana(levels_of(model)) if path is None else Policy.load(path)
    if options.fresh is not None:
        policy = replace(policy, fresh=dict.fromkeys(policy.families, options.fresh))
    records = [prompt.record for prompt in material.prompts if prompt.record["group"] != TWINS]
    count = min(options.prompts or (CPU_PROMPTS if on_cpu else PROMPTS), len(records))
    prompts = [records[place * len(records) // count]["prompt"] for place in range(count)]
    print(f"{card.name}, {describe(model.device)}, {model.dtype}, {count} prompts, policy: {policy.source}")
    results: dict[str, Any] = {"prompts": prompts}
    for sampler in options.sampler:
        own_steps = card.samplers[sampler].steps
        steps = options.steps or (min(own_steps, CPU_STEPS) if on_cpu else own_steps)
        stage = Stage(model, material.scorer, prompts, sampler, steps)
        share = policy.fresh.get(family_of(sampler), 0.0)
        policies = {f"{100 * share:.0f}% fresh noise": policy} if share else {}
        policies["no fresh noise"] = replace(policy, fresh={})
        rows = {"from scratch": stage.figures(stage.again(None, 1))}
        for name, each in policies.items():
            rows |= {f"{name}, {asked}": stage.figures(stage.again(each, n)) for asked, n in ASKED.items()}
        results[sampler] = rows
        print_table(f"{sampler}, {steps} steps, guidance {card.samplers[sampler].guidance_scale:g}", rows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{options.output} has every figure")


if __name__ == "__main__":
    main()
