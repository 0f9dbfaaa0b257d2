"""An evaluation as a table to read and as files to keep."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service.diffusion.request import Image, ImageRequest
from service.errors import SetupError
from service.evaluation.figures import Evaluation, Figures
from service.evaluation.metrics import SCORE, SHARES
from service.evaluation.prompts import Prompt
from service.pictures import contact_sheet, encode
from service.recipe import recipe_of

SHEET_PICTURES = 64  # the first ones, no choosing
RESULTS, ROWS, SHEET, PICTURES = "results.json", "rows.jsonl", "sheet.png", "pictures"


class Folder:
    """What a run leaves in DIR: results.json, rows.jsonl, and where asked for pictures/ID.png and sheet.png.

    Files of an earlier run are written over. results.json goes first and comes last, so that where it is, it belongs to
    the rows and the pictures beside it.

    Raises:
        SetupError: it cannot be written to.
    """

    def __init__(self, path: Path, *, pictures: bool, sheet: bool) -> None:
        self.path = path
        self._pictures, self._sheet = pictures, sheet
        self._tiles: list[np.ndarray] = []
        try:
            (path / PICTURES if pictures else path).mkdir(parents=True, exist_ok=True)
            (path / RESULTS).unlink(missing_ok=True)
        except OSError as error:
            raise SetupError(f"--out: {path}: cannot be written: {error.strerror}") from None

    def keep(self, model: str, prompt: Prompt, request: ImageRequest, image: Image) -> None:
        """Of one picture that the model drew, what was asked for."""
        pixels = np.asarray(image.pixels)
        if self._pictures:
            data = encode(pixels, "png", 0, recipe_of(request, image.seed, model))
            self._write(f"{PICTURES}/{prompt.record['id']}.png", data)
        if self._sheet and len(self._tiles) < SHEET_PICTURES:
            self._tiles.append(pixels)

    def finish(self, evaluation: Evaluation, results: dict[str, Any]) -> None:
        if self._tiles:
            self._write(SHEET, encode(contact_sheet(self._tiles), "png", 0))
        rows = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in evaluation.rows]
        self._write(ROWS, "".join(f"{row}\n" for row in rows).encode())
        self._write(RESULTS, (json.dumps(results, ensure_ascii=False, indent=2) + "\n").encode())

    def _write(self, name: str, data: bytes) -> None:
        try:
            (self.path / name).write_bytes(data)
        except OSError as error:
            raise SetupError(f"{self.path / name}: cannot be written: {error.strerror}") from None


def table(model: str, evaluation: Evaluation, metrics: Sequence[str] | None) -> str:
    """What was drawn; a line a group and one for all, columns aligned; then what else there is to say."""
    shown = [metric for metric in SHARES if metric in evaluation.overall.shares]
    score = metrics is None or SCORE in metrics
    lines = [["group", "n", *([SCORE] if score else []), *shown]]
    for name, figures in {**evaluation.groups, "overall": evaluation.overall}.items():
        lines.append([name, str(figures.n), *([f"{figures.score:.3f}"] if score else []), *_shares(figures, shown)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    for group, found in evaluation.twins.items():
        for metric, pair in found.items():
            ratio = "" if pair.ratio is None else f", {percent(pair.ratio)} of it"
            text.append(
                f"{group}: {metric} {percent(pair.share)}, their twins {percent(pair.twins_share)}{ratio} (n {pair.n})"
            )
    if evaluation.frechet is not None:
        text.append(f"Frechet distance to real renders: {evaluation.frechet:.4g}")
    pictures = len(evaluation.rows)
    text.append(
        f"{pictures} pictures, {evaluation.evaluations_per_picture:g} evaluations each, "
        f"{evaluation.seconds_per_picture:.3g} s a picture (engine {evaluation.engine_s / pictures:.3g} s), "
        f"{pictures / evaluation.wall_s:.3g} pictures/s"
    )
    chosen = evaluation.settings
    if chosen["cache"] != "bypass":
        skipped = f"{evaluation.steps_skipped_per_picture:.3g} of {chosen['steps']} steps skipped a picture"
        text.append(f"cache ({chosen['cache']}): {percent(evaluation.hit_rate)} hits, {skipped}")
    loras = "".join(f", LoRA {name} at {scale:g}" for name, scale in chosen["loras"].items())
    title = (
        f"{model}: {chosen['sampler']}, {chosen['steps']} steps, guidance {chosen['guidance_scale']:g}{loras}, "
        f"{chosen['size']}"
    )
    return "\n".join([title, *text, *evaluation.notes])


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _shares(figures: Figures, metrics: Sequence[str]) -> list[str]:
    """Percentages, each with its own n where that is not the group's."""
    found = [figures.shares.get(metric) for metric in metrics]
    return [
        "-" if each is None else percent(each.share) + (f" ({each.n})" if each.n != figures.n else "") for each in found
    ]
