"""What the approximate cache saves on a stream of prompts, and what it costs in quality.

    python bench/cache_trace.py (FILE | --synthetic) [--full] [--policy FILE] [-o out/cache-trace.json]

FILE is text, JSON Lines or parquet; bench/traces.py says what the synthetic stream is. Requests come as fast as the
engine takes them, --at-once at a time, to an engine with the cache that `headstart serve` has, empty at first and kept
in memory. Each pass draws the same requests with the same seeds:

- cache off and on, and off with other seeds, which shows what of a difference is chance;
- the calibrated policy against itself without fresh noise, where it asks for some, against NIRVANA's thresholds, and
  against one K for every similarity from 0.65 on;
- DPM++ and LCM that look into what DDIM left, where their guidance is DDIM's too.

Without --full, the first of these alone. "repeats" is how much the pictures of prompts that came more than once differ,
the LPIPS of service/calibration/diversity.py, in percent of that with the cache off. Scores and shares are of the
scorer; the Frechet distance, in its features, is that to the pictures drawn with the cache off, left out where they are
fewer than the features. Eviction policies are compared by decisions alone, on a longer stream: the same lookups and
inserts, nothing drawn; so is the match predictor, whose own time bench/cache_predictor.py has.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from engine import describe
from traces import Asked, read_trace, synthetic, told

from accel.samplers.library import build_plan
from cache.latent.eviction import EVICTORS
from cache.latent.keys import KeySpace
from cache.latent.lookup import LatentCache
from cache.latent.policy import Policy, nirvana
from cache.latent.predictor import MatchPredictor
from cache.latent.store import MemoryStore
from models.diffusion.loading import load_model
from models.diffusion.model import DiffusionModel
from models.scorer import Scorer, Statistics, frechet
from models.scorer.scorer import Reading
from service.caching import KEPT, CacheStarts, family_of, levels_of
from service.calibration.diversity import layouts, spread
from service.calibration.drawing import verdicts_of
from service.config import EngineSettings, ModelSettings
from service.diffusion.admission import resolve
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import CacheIntent, Completed, Draft, Image, ImageRequest
from service.evaluation.material import open_material
from service.evaluation.prompts import TWINS
from service.events import Failed
from service.opening import POLICY

PLENTY = 10**12  # bytes: nothing is evicted
TENANT = "default"
JUDGED_AT_ONCE = 64
FIXED_FROM = 0.65  # NIRVANA's least similarity
SHARES = ("all", "objects", "background")


class Sizes(NamedTuple):
    """How much a run draws. drawn: requests of a pass; decided: requests of the comparisons without pictures."""

    drawn: int
    decided: int
    steps: int  # of DDIM
    ablations: bool


QUICK_CPU = Sizes(6, 400, 10, False)
QUICK = Sizes(300, 2000, 50, False)
FULL = Sizes(1000, 5000, 50, True)


class Sampling(NamedTuple):
    sampler: str
    steps: int
    guidance: float


class Pass(NamedTuple):
    """One pass over the requests: pictures, seconds from arrival to the last byte and in lookups, and what was seen."""

    images: list[Image]
    total_s: list[float]
    lookup_s: list[float]
    verdicts: dict[str, list[float | None]]
    features: torch.Tensor  # [N, F]
    repeats: float | None  # how much pictures of one prompt differ; None where no prompt came twice


class Stage:
    """A model, its scorer and the requests of a stream, drawn with one cache or another."""

    def __init__(self, model: DiffusionModel, scorer: Scorer, asked: Sequence[Asked], at_once: int) -> None:
        self._model, self._scorer, self._asked, self._at_once = model, scorer, asked, at_once
        self.vectors = embedded(scorer, [each.record["prompt"] for each in asked])
        self._limits = EngineSettings(max_batch=2 * at_once, max_running=at_once)

    def draw(self, sampling: Sampling, cache: LatentCache | None, *, store: bool = True, seed: int = 0) -> Pass:
        """Draw all requests; with a cache, look into it, and leave latents in it if `store`."""
        starts = None if cache is None else CacheStarts(cache, self._model, "traced")
        engine = DiffusionEngine(self._model, self._limits, starts=starts)
        waiting = [self._request(number, sampling, store, seed) for number in range(len(self._asked))]
        images: dict[str, Image] = {}
        done: dict[str, Completed] = {}
        added: dict[str, float] = {}
        total: dict[str, float] = {}
        while len(done) < len(self._asked):
            while waiting and len(added) - len(done) < self._at_once:
                request = waiting.pop(0)
                added[request.id] = time.perf_counter()
                engine.add(request)
            for event in engine.step():
                if isinstance(event, Failed):
                    raise SystemExit(f"request {event.request_id} failed: {event.error}")
                if isinstance(event, Image):
                    images[event.request_id] = event
                if isinstance(event, Completed):
                    done[event.request_id] = event
                    total[event.request_id] = time.perf_counter() - added[event.request_id]
        ids = [str(number) for number in range(len(self._asked))]
        pictures = [images[each] for each in ids]
        verdicts, features, looks = self._judge(pictures)
        lookups = [done[each].timings.lookup_s for each in ids]
        return Pass(pictures, [total[each] for each in ids], lookups, verdicts, features, self._repeats(looks))

    def _request(self, number: int, sampling: Sampling, store: bool, seed: int) -> ImageRequest:
        record = self._asked[number].record
        draft = Draft(
            prompt=record["prompt"],
            seed=(record["seed"] + seed) % 2**32,
            sampler=sampling.sampler,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
        )
        request = resolve(draft, self._model.card, self._limits, id=str(number), random_seed=0)
        intent = CacheIntent(embedding=self.vectors[number], look=True, store=store)
        return replace(request, tenant=TENANT, cache=intent)

    def _repeats(self, looks: torch.Tensor) -> float | None:
        places: dict[str, list[int]] = {}
        for place, each in enumerate(self._asked):
            places.setdefault(each.record["prompt"], []).append(place)
        found = [spread(looks[same].float()) for same in places.values() if len(same) > 1]
        return sum(found) / len(found) if found else None

    def _judge(self, images: Sequence[Image]) -> tuple[dict[str, list[float | None]], torch.Tensor, torch.Tensor]:
        verdicts: dict[str, list[float | None]] = {}
        features, looks = [], []
        for at in range(0, len(images), JUDGED_AT_ONCE):
            part = slice(at, at + JUDGED_AT_ONCE)
            pixels = torch.from_numpy(np.stack([np.asarray(image.pixels) for image in images[part]]))
            reading: Reading = self._scorer.read(pixels.to(self._scorer.device).permute(0, 3, 1, 2).float() / 127.5 - 1)
            records = [each.record for each in self._asked[part]]
            for metric, values in verdicts_of(self._scorer, reading, records).items():
                verdicts.setdefault(metric, []).extend(values)
            features.append(reading.features.cpu())
            looks.append(layouts(reading).half().cpu())
        return verdicts, torch.cat(features), torch.cat(looks)


def embedded(scorer: Scorer, prompts: Sequence[str]) -> np.ndarray:
    """[N, D] float32, unit norm."""
    vectors: np.ndarray = scorer.embed_text(prompts).cpu().numpy()
    return vectors


def opened(
    policy: Policy, evictor: str = "lcbfu", budget: int = PLENTY, predictor: MatchPredictor | None = None
) -> LatentCache:
    return LatentCache(MemoryStore(), budget, policy, evictor, seed=0, predictor=lambda: predictor)


def fixed(k: int, levels: Mapping[int, float]) -> Policy:
    """One K for every prompt that is similar at all."""
    return Policy({"solver": ((FIXED_FROM, levels[k]),)}, levels, f"K = {k} from {FIXED_FROM:g} on")


def summary(drawn: Pass, scratch: Pass, policy: Policy | None) -> dict[str, Any]:
    """The figures of one pass; qualities relative to the pass with the cache off too."""
    run, skipped = (sum(getattr(image, name) for image in drawn.images) for name in ("steps_run", "steps_skipped"))
    found: dict[str, Any] = {
        "requests": len(drawn.images),
        "hits": sum(image.cache_result == "hit" for image in drawn.images) / len(drawn.images),
        "evaluations": sum(image.evaluations for image in drawn.images),
        "saved": skipped / (run + skipped),
        "p50_s": float(np.percentile(drawn.total_s, 50)),
        "p99_s": float(np.percentile(drawn.total_s, 99)),
        "lookup_p99_s": float(np.percentile(drawn.lookup_s, 99)),
    }
    rows = Counter(image.steps_skipped for image in drawn.images)
    found["rows_skipped"] = {row: count / len(drawn.images) for row, count in sorted(rows.items())}
    for metric in ("score", *SHARES):
        here, there = mean(drawn.verdicts[metric]), mean(scratch.verdicts[metric])
        if here is not None and there:
            found[metric] = here
            found[f"{metric}_kept"] = here / there
    if drawn is not scratch and len(drawn.features) >= drawn.features.shape[1]:
        found["frechet"] = frechet(drawn.features, Statistics.of(scratch.features))
    if drawn.repeats is not None and scratch.repeats:
        found["repeats"] = drawn.repeats
        found["repeats_kept"] = drawn.repeats / scratch.repeats
    if policy is not None:
        found["policy"] = {"source": policy.source, "families": {k: list(v) for k, v in policy.families.items()}}
        found["policy"]["fresh"] = dict(policy.fresh)
    return found


def mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return sum(told) / len(told) if told else None


def print_passes(title: str, passes: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{title}\n")
    heads = ["", "hits", "saved", "p50 s", "p99 s", "score", "all right", "objects", "background", "Frechet", "repeats"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for name, found in passes.items():
        qualities = [
            f"{100 * found[metric]:.1f} ({100 * found[f'{metric}_kept']:.1f}%)" if metric in found else "-"
            for metric in ("score", *SHARES)
        ]
        cells = [
            name,
            f"{100 * found['hits']:.1f}%",
            f"{100 * found['saved']:.1f}%",
            f"{found['p50_s']:.3f}",
            f"{found['p99_s']:.3f}",
            *qualities,
            f"{found['frechet']:.3f}" if "frechet" in found else "-",
            f"{100 * found['repeats_kept']:.1f}%" if "repeats_kept" in found else "-",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
    for name, found in passes.items():
        if found["hits"]:
            rows = ", ".join(f"{row}: {100 * share:.1f}%" for row, share in found["rows_skipped"].items())
            print(f"\n{name}: requests by rows skipped: {rows}")


class Decisions:
    """The lookups and inserts of a stream, one request after the other, without pictures.

    Latents are noise of the model's shape, since real ones compress as little.
    """

    def __init__(self, model: DiffusionModel, sampling: Sampling, asked: Sequence[Asked], scorer: Scorer) -> None:
        card = model.card
        width, height = card.default_size
        shape = (card.latent_channels, height // card.scale, width // card.scale)
        self._space = KeySpace(TENANT, "traced", "discrete", (), shape, sampling.guidance, "")
        defaults = card.samplers[sampling.sampler]
        schedule = model.schedule(sampling.sampler)
        plan = build_plan(sampling.sampler, schedule, sampling.steps, spacing=defaults.spacing, karras=defaults.karras)
        self._rows = [row.alpha for row in plan.rows]
        self._family = family_of(sampling.sampler)
        noise = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
        self._latents = dict.fromkeys(levels_of(model).values(), noise)
        self._prompts = [each.record["prompt"] for each in asked]
        self._vectors = embedded(scorer, self._prompts)

    def run(self, cache: LatentCache, predictor: MatchPredictor | None = None) -> dict[str, Any]:
        """Share of hits, of lookups skipped, of rows saved, hits by K, bytes at the end, and lookup seconds.

        predictor: the cache's, if it has one; its training must not slow down what is measured.
        """
        lookup_s = []
        for number, (prompt, vector) in enumerate(zip(self._prompts, self._vectors, strict=True)):
            begun = time.perf_counter()
            (found,) = cache.find(self._space, vector, self._family, self._rows, 1, number)
            lookup_s.append(time.perf_counter() - begun)
            if predictor is not None:
                predictor.settle(60)
            if found is None:
                cache.insert(self._space, prompt, vector, self._latents)
                cache.flush(10)
        stats, count = cache.stats(TENANT), len(self._prompts)
        cache.close()
        return {
            "hits": stats.counts["hit"] / count,
            "not_looked_up": stats.counts["skipped"] / count,
            "saved": stats.counts["rows_skipped"] / (count * len(self._rows)),
            "by_k": {k: hits / count for k, hits in stats.hits_by_steps.items()},
            "evicted": stats.counts["evicted"],
            "bytes": stats.bytes,
            "lookup_p50_s": float(np.percentile(lookup_s, 50)),
            "lookup_p99_s": float(np.percentile(lookup_s, 99)),
        }


def print_decisions(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{title}\n")
    heads = ["", "hits", "not looked up", "saved", "by K", "evicted levels", "MB", "lookup p50 ms", "p99 ms"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for name, found in rows.items():
        by_k = ", ".join(f"{k}: {100 * share:.1f}%" for k, share in found["by_k"].items())
        times = [f"{1e3 * found[f'lookup_{name}_s']:.2f}" for name in ("p50", "p99")]
        cells = [name, *(f"{100 * found[share]:.1f}%" for share in ("hits", "not_looked_up", "saved")), by_k or "-"]
        print("| " + " | ".join([*cells, str(found["evicted"]), f"{found['bytes'] / 1e6:.1f}", *times]) + " |")


def main() -> None:
    options = parsed()
    settings = ModelSettings(model=options.model, device=options.device, dtype=options.dtype)
    material = open_material(settings, options.prompts)
    model = load_model(options.model, dtype=options.dtype, device=options.device, cache_dir=settings.cache_dir)
    sizes = FULL if options.full else QUICK if model.device.type == "cuda" else QUICK_CPU
    drawn, decided = options.requests or sizes.drawn, options.decided or sizes.decided
    if options.file is not None:
        stream = read_trace(options.file, options.seed)
    else:
        records = [prompt.record for prompt in material.prompts if prompt.record["group"] != TWINS]
        stream = synthetic(records, max(drawn, decided), options.seed)
    levels = levels_of(model)
    card = model.card
    own = Path(card.source) / POLICY
    path = options.policy or (own if own.is_file() else None)
    policy = nirvana(levels) if path is None else Policy.load(path)
    ddim = Sampling("ddim", options.steps or sizes.steps, card.samplers["ddim"].guidance_scale)
    print(f"{card.name}, {describe(model.device)}, {model.dtype}, {options.at_once} requests at once, {policy.source}")
    print(f"drawn: {told(stream[:drawn])}; decided: {told(stream[:decided])}")
    stage = Stage(model, material.scorer, stream[:drawn], options.at_once)
    results: dict[str, Any] = {"passes": {}}

    def report(title: str, passes: dict[str, Any]) -> None:
        results["passes"][title] = passes
        print_passes(title, passes)

    kept = opened(policy)
    scratch = stage.draw(ddim, None)
    passes = {"off": summary(scratch, scratch, None), "on": summary(stage.draw(ddim, kept), scratch, policy)}
    if sizes.ablations:
        passes["off, other seeds"] = summary(stage.draw(ddim, None, seed=1), scratch, None)
    report(f"ddim, {ddim.steps} steps, guidance {ddim.guidance:g}", passes)
    if "lcm" in card.samplers and not card.samplers["lcm"].needs_lora:
        lcm = Sampling("lcm", card.samplers["lcm"].steps, card.samplers["lcm"].guidance_scale)
        few = stage.draw(lcm, None)
        passes = {"off": summary(few, few, None), "on": summary(stage.draw(lcm, opened(policy)), few, policy)}
        report(f"lcm, {lcm.steps} steps, guidance {lcm.guidance:g}", passes)
    if sizes.ablations:
        bare = replace(policy, fresh={}, source=f"{policy.source}, no fresh noise")
        others = [*([bare] if any(policy.fresh.values()) else []), nirvana(levels), *(fixed(k, levels) for k in KEPT)]
        report(
            f"policies, ddim, {ddim.steps} steps",
            {each.source: summary(stage.draw(ddim, opened(each)), scratch, each) for each in others},
        )
        for sampler in ("dpmpp_2m", "lcm"):
            if sampler in card.samplers and not card.samplers[sampler].needs_lora:
                other = Sampling(sampler, card.samplers[sampler].steps, ddim.guidance)
                own = stage.draw(other, None)
                begun = stage.draw(other, kept, store=False)
                passes = {"off": summary(own, own, None), "from DDIM's latents": summary(begun, own, policy)}
                report(f"{sampler}, {other.steps} steps, guidance {other.guidance:g}", passes)
    decisions = Decisions(model, ddim, stream[:decided], material.scorer)
    whole = decisions.run(opened(policy))
    rows = {"all kept": whole}
    for share in options.budgets:
        budget = int(share * whole["bytes"])
        rows |= {f"{name}, {100 * share:g}%": decisions.run(opened(policy, name, budget)) for name in EVICTORS}
    predictor = MatchPredictor()
    predicted = decisions.run(opened(policy, predictor=predictor), predictor)
    results["decisions"] = rows | {"match predictor": predicted}
    print_decisions(f"eviction, {decided} requests, budgets in percent of what is kept without one", rows)
    print_decisions(f"match predictor, {decided} requests", {"off": whole, "on": predicted})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{options.output} has every figure")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a stream of prompts")
    source.add_argument("--synthetic", action="store_true", help="make one up")
    parser.add_argument("--prompts", type=Path, help="records that --synthetic is made of; default: the bundle's")
    parser.add_argument("--model", default="default")
    parser.add_argument("--policy", type=Path, help="default: the model's own, else NIRVANA's thresholds")
    parser.add_argument("--full", action="store_true", help="1,000 requests a pass, 5,000 decided, and the ablations")
    parser.add_argument("--requests", type=int, help="drawn in each pass")
    parser.add_argument("--decided", type=int, help="requests of the comparisons without pictures")
    parser.add_argument("--steps", type=int, help="of DDIM; default: 50, but 10 on a CPU")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25], help="shares of what is kept without one")
    parser.add_argument("--at-once", type=int, default=16, help="requests that are live at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/cache-trace.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
