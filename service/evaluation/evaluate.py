"""Draw prompts, judge the pictures, and say how well the model did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from service.diffusion.request import Draft, Image, ImageRequest
from service.evaluation.drawing import Easel
from service.evaluation.figures import Evaluation, Judged, figures_of, groups_of, twins_of
from service.evaluation.metrics import FRECHET, METRICS, SHARES, says
from service.evaluation.prompts import TWINS, Prompt
from service.oneshot import FLAGS

if TYPE_CHECKING:
    from models.scorer import Scorer, Statistics

HELD_BYTES = (
    1 << 30
)  # of pictures that wait to be judged: all of them are drawn first, so that judging takes no one's time
JUDGED_AT_ONCE = 64

Keep = Callable[[Prompt, ImageRequest, Image], None]


def evaluate(
    easel: Easel,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    template: Draft,
    *,
    metrics: Sequence[str] | None = None,
    reference: Statistics | None = None,
    keep: Keep | None = None,
    quiet: bool = True,
) -> Evaluation:
    """Draw one picture a prompt and judge it.

    Args:
        prompts: at least one, each with the seed that its picture is drawn with.
        template: the settings of every picture; its prompt and seed are replaced.
        metrics: names of METRICS; None: all that the prompts allow, a Frechet distance only where it means something.
        reference: of real renders.
        keep: called with every picture, in the order of the prompts.

    Raises:
        InputError: the model cannot draw with these settings.
        HeadstartError: a picture could not be drawn.
    """
    requests = [_request(easel, template, prompt) for prompt in prompts]
    easel.warm_up(template)
    rows: list[Judged] = []
    features: list[torch.Tensor] = []
    wall_s = engine_s = 0.0
    wanted = METRICS if metrics is None else metrics
    held = max(1, HELD_BYTES // (3 * requests[0].width * requests[0].height))
    with tqdm(total=len(requests), unit="picture", leave=False, disable=quiet or None) as bar:
        for start in range(0, len(requests), held):
            part = slice(start, start + held)
            drawn = easel.draw(requests[part], bar.update)
            wall_s, engine_s = wall_s + drawn.wall_s, engine_s + drawn.engine_s
            for at in range(0, len(drawn.images), JUDGED_AT_ONCE):
                images = drawn.images[at : at + JUDGED_AT_ONCE]
                asked = prompts[start + at : start + at + len(images)]
                found, seen = _judge(scorer, asked, images, wanted)
                rows += found
                features.append(seen)
            if keep is not None:
                for prompt, request, image in zip(prompts[part], requests[part], drawn.images, strict=True):
                    keep(prompt, request, image)
    own = [i for i, row in enumerate(rows) if row.group != TWINS]
    frechet, notes = _frechet(torch.cat(features)[own], reference, metrics)
    return Evaluation(
        settings=_settings(requests[0]) | {"cache": easel.cache},
        rows=rows,
        overall=figures_of([rows[i] for i in own], wanted),
        groups=groups_of(rows, wanted),
        twins=twins_of(rows, wanted),
        frechet=frechet,
        evaluations_per_picture=sum(row.evaluations for row in rows) / len(rows),
        wall_s=wall_s,
        engine_s=engine_s,
        notes=notes,
    )


def _request(easel: Easel, template: Draft, prompt: Prompt) -> ImageRequest:
    draft = replace(template, prompt=prompt.record["prompt"], seed=prompt.record["seed"])
    return easel.runtime.resolve(draft, {**FLAGS, "prompt": f"line {prompt.line}: prompt"})


def _settings(request: ImageRequest) -> dict[str, Any]:
    return {
        "sampler": request.sampler,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "size": f"{request.width}x{request.height}",
        "loras": dict(request.loras),
    }


def _judge(
    scorer: Scorer, prompts: Sequence[Prompt], images: Sequence[Image], metrics: Sequence[str]
) -> tuple[list[Judged], torch.Tensor]:
    """A row a picture, and the features [N, F] on the host."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.pixels) for image in images])).to(scorer.device)
    reading = scorer.read(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    # The scorer wants an object. Where a record names none, it gets one, and nobody asks what it says of it.
    some = [{"concept": scorer.vocabulary.names[0], "count": 1, "colour": None, "size": None}]
    found = scorer.judge(reading, [prompt.record | {"objects": prompt.record["objects"] or some} for prompt in prompts])
    rows = []
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        record = prompt.record
        verdicts = {metric: bool(found[metric][i]) for metric in SHARES if metric in metrics and says(metric, record)}
        rows.append(
            Judged(
                prompt.line,
                record["id"],
                record["group"],
                record["twin"],
                record["prompt"],
                image.seed,
                image.evaluations,
                float(found["score"][i]),
                verdicts,
                image.cache_result,
                image.steps_skipped,
            )
        )
    return rows, reading.features.cpu()


def _frechet(
    features: torch.Tensor, reference: Statistics | None, metrics: Sequence[str] | None
) -> tuple[float | None, list[str]]:
    """The distance and what must be said of it; asked for by name it is measured whatever it means."""
    asked = metrics is not None and FRECHET in metrics
    if reference is None or (metrics is not None and not asked):
        return None, []
    pictures, width = features.shape
    note = f"Frechet distance: {pictures} pictures are fewer than the {width} features, so that it means little"
    if pictures < width and not asked:
        return None, [f"{note}; left out"]
    from models.scorer import frechet

    return frechet(features, reference), [note] if pictures < width else []
