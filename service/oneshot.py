"""`headstart generate` and `rewrite`: the service's own admission and engines, without HTTP, from the command line."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from service.config import DEFAULT_TENANT, Settings
from service.diffusion.request import Completed, Draft, Image, ImageRequest, Progress, parse_size
from service.errors import CancelledError, SetupError
from service.events import Failed
from service.pictures import SUFFIXES, contact_sheet, encode
from service.prompts import checked_text
from service.recipe import Recipe, recipe_of

if TYPE_CHECKING:
    from service.llm.rewrite import Rewrite
    from service.runtime import Runtime

# What the command line calls a draft's fields.
FLAGS = {
    "prompt": "PROMPT",
    "n": "--n",
    "negative_prompt": "--negative",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "width": "--size: width",
    "height": "--size: height",
    "size": "--size",
    "sampler": "--sampler",
    "eta": "--eta",
    "seed": "--seed",
    "class_label": "--class-label",
    "timesteps": "--timesteps",
    "loras": "--lora",
    "patch_degree": "--patch-degree",
}


class Lora(NamedTuple):
    name: str
    file: str
    scale: float


class Output(NamedTuple):
    """Where the pictures go. path None: one file on stdout."""

    path: Path | None
    format: str
    quality: int

    def numbered(self, number: int) -> Path:
        """fox.png -> fox-1.png"""
        assert self.path is not None
        return self.path.with_name(f"{self.path.stem}-{number}{self.path.suffix}")

    def write(self, path: Path | None, data: bytes) -> None:
        if path is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        try:
            path.write_bytes(data)
        except OSError as error:
            raise SetupError(f"{path}: cannot be written: {error.strerror}") from None


def plan_output(output: str, format: str | None, quality: int, described: bool) -> Output:
    """Check where to write before anything is drawn. Raises SetupError."""
    if not 0 <= quality <= 100:
        raise SetupError(f"--quality: {quality} is not allowed; an integer from 0 to 100")
    if output == "-":
        if described:
            raise SetupError("--json and -o - would both write to stdout; name a file")
        return Output(None, format or "png", quality)
    path = Path(output)
    chosen = format or SUFFIXES.get(path.suffix.lower())
    if chosen is None:
        raise SetupError(f"-o: {output!r} is not allowed; a name ending in {', '.join(SUFFIXES)}, or give --format")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "is a folder" if path.is_dir() else "no such folder" if not path.parent.is_dir() else "not permitted"
        raise SetupError(f"-o: {output}: cannot be written: {reason}")
    return Output(path, chosen, quality)


def parse_loras(texts: Sequence[str]) -> list[Lora]:
    """[NAME=]FILE[:SCALE], the name being the file's where it is left out. Raises SetupError."""
    loras = []
    for text in texts:
        match = re.fullmatch(r"(?:([\w.-]+)=)?(.+?)(?::(-?\d+(?:\.\d+)?))?", text)
        if match is None:
            raise SetupError(f"--lora: {text!r} is not allowed; [NAME=]FILE[:SCALE]")
        name = match[1] or re.sub(r"[^\w.-]", "-", Path(match[2]).stem)
        loras.append(Lora(name, match[2], float(match[3] or 1)))
    return loras


def draft_of(chosen: argparse.Namespace, loras: Sequence[Lora]) -> Draft:
    """What the flags ask for. Raises InputError for a size that is none."""
    width = height = None
    if chosen.size is not None:
        width, height = parse_size("--size", chosen.size, "WIDTHxHEIGHT, such as 256x256")
    return Draft(
        prompt=chosen.prompt,
        negative_prompt=chosen.negative,
        n=chosen.n,
        width=width,
        height=height,
        num_inference_steps=chosen.steps,
        guidance_scale=chosen.guidance,
        sampler=chosen.sampler,
        eta=chosen.eta,
        seed=chosen.seed,
        class_label=chosen.class_label,
        timesteps=chosen.timesteps,
        patch_degree=chosen.patch_degree,
        loras=tuple((lora.name, lora.scale) for lora in loras),
    )


class Drawn(NamedTuple):
    """rewrite: what became of the prompt, if it was to be rewritten; the request has what was drawn."""

    request: ImageRequest
    images: list[Image]
    completed: Completed
    rewrite: Rewrite | None


def rewrite(settings: Settings, prompt: str, *, quiet: bool) -> Rewrite:
    """The prompt rewritten for the image model of the settings, or why it was not.

    Raises:
        ModelError, InputError, SetupError: the caller can mend it.
    """
    prompt = checked_text("PROMPT", prompt, 1)
    say(f"loading {settings.llm.model} for {settings.model.model}", quiet)
    from service.runtime import open_runtime  # seconds, for torch

    llm = dataclasses.replace(settings.llm, enabled="on")
    runtime = open_runtime(dataclasses.replace(settings, llm=llm), writing=True)

    async def ask() -> Rewrite:
        runtime.start()
        try:
            await runtime.warm_up_rewriting()
            return await runtime.rewrite(prompt, DEFAULT_TENANT)
        finally:
            await runtime.close(0)

    return asyncio.run(ask())


def generate(
    settings: Settings, draft: Draft, output: Output, *, cache: str, enhance: bool, quiet: bool
) -> dict[str, Any]:
    """Draw and write; what was drawn, fit for JSON.

    Args:
        cache: the cache mode; it is opened for any but "bypass".
        enhance: let the language model rewrite the prompt first.

    Raises:
        ModelError, InputError, SetupError: the caller can mend it.
        HeadstartError: drawing failed.
    """
    say(f"loading {settings.model.model}", quiet)
    from service.runtime import open_runtime  # seconds, for torch

    runtime = open_runtime(settings, cached=cache != "bypass", writing=enhance)
    request = runtime.resolve(draft, FLAGS)
    if draft.patch_degree is None:
        runtime.measure((request.width, request.height))
        request = runtime.resolve(draft, FLAGS)
    drawn = asyncio.run(_draw(runtime, request, draft, cache, enhance, quiet))
    files = _write(drawn.request, drawn.images, runtime.card.name, output)
    if drawn.rewrite is not None:
        say(told(drawn.rewrite), quiet)
    for file, image in zip(files, drawn.images, strict=False):
        say(f"{file}: seed {image.seed}, {image.steps_run} steps, {drawn.completed.timings.total_s:.1f} s", quiet)
    for warning in drawn.completed.warnings:
        say(warning, quiet)
    return _described(drawn, request.prompt, runtime.card.name, files)


def told(done: Rewrite) -> str:
    """What became of a prompt, in a line."""
    if done.outcome == "rewritten":
        return f"rewritten in {done.seconds:.1f} s: {done.prompt}"
    return f"the prompt was kept: {done.reason or 'there was nothing to change'}"


def say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr)


async def _draw(runtime: Runtime, request: ImageRequest, draft: Draft, cache: str, enhance: bool, quiet: bool) -> Drawn:
    runtime.start()
    images: list[Image] = []
    done = dict.fromkeys(range(request.n), 0)
    try:
        rewrite = None
        if enhance:
            await runtime.warm_up_rewriting()
            rewrite = await runtime.rewrite(request.prompt, DEFAULT_TENANT)
            request = dataclasses.replace(request, prompt=rewrite.prompt)
        request = await runtime.with_cache(request, draft, cache, DEFAULT_TENANT)
        with tqdm(total=request.n * request.steps, unit="step", leave=False, disable=quiet or None) as bar:
            async for event in runtime.bridge.submit(request):
                if isinstance(event, Progress):
                    done[event.index] = event.step
                    bar.update(sum(done.values()) - bar.n)
                elif isinstance(event, Image):
                    images.append(event)
                elif isinstance(event, Failed):
                    raise event.error
                elif isinstance(event, Completed):
                    return Drawn(request, sorted(images, key=lambda image: image.index), event, rewrite)
        raise CancelledError("the request was cancelled")
    finally:
        await runtime.close(0)


def _write(request: ImageRequest, images: Sequence[Image], model: str, output: Output) -> list[Path]:
    """The files written; the contact sheet, when there is one, is the last."""
    pixels = [cast(np.ndarray, image.pixels) for image in images]
    recipes = [recipe_of(request, image.seed, model, image.steps_skipped) for image in images]
    if len(images) == 1:
        output.write(output.path, encode(pixels[0], output.format, output.quality, recipes[0]))
        return [output.path] if output.path is not None else []
    files = []
    if output.path is not None:
        for number, (picture, recipe) in enumerate(zip(pixels, recipes, strict=True), start=1):
            files.append(output.numbered(number))
            output.write(files[-1], encode(picture, output.format, output.quality, recipe))
        files.append(output.path)
    sheet_recipe = Recipe(
        recipes[0].prompt, recipes[0].negative_prompt, recipes[0].parameters | {"Pictures": str(len(images))}
    )
    output.write(output.path, encode(contact_sheet(pixels), output.format, output.quality, sheet_recipe))
    return files


def _described(drawn: Drawn, prompt: str, model: str, files: Sequence[Path]) -> dict[str, Any]:
    request, images, completed, rewrite = drawn
    outcome = {} if rewrite is None else {"rewrite": rewrite.facts}
    return {
        "id": request.id,
        "model": model,
        "prompt": prompt,
        "revised_prompt": request.prompt,
        **outcome,
        "negative_prompt": request.negative_prompt,
        "size": f"{request.width}x{request.height}",
        "sampler": request.sampler,
        "guidance_scale": request.guidance_scale,
        "images": [
            {
                "file": str(file),
                "seed": image.seed,
                "steps_run": image.steps_run,
                "steps_skipped": image.steps_skipped,
                "evaluations": image.evaluations,
                "cache": image.cache_result,
                "similarity": image.similarity,
            }
            for file, image in zip(files, images, strict=False)
        ],
        "contact_sheet": str(files[-1]) if len(images) > 1 else None,
        "timings": {"rewrite_s": 0.0 if rewrite is None else rewrite.seconds} | dataclasses.asdict(completed.timings),
        "warnings": completed.warnings,
    }
