"""All that it takes to draw a picture again, as the text that pictures carry.

    a red fox
    Negative prompt: blurry
    Steps: 4, Sampler: LCM, CFG scale: 2, Seed: 7, Size: 256x256, Model: default, Version: headstart 0.1.0

The layout is ambiguous: a prompt may hold a line that looks like the second or the third. Where reading the plain
layout back would not give the same prompts, the last line repeats them as JSON strings, under keys of their own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from service.config import version
from service.diffusion.request import ImageRequest

SAMPLER_LABELS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "lcm": "LCM",
    "consistency": "Consistency",
}
NEGATIVE = "Negative prompt: "
EXACT_PROMPT = "Exact prompt"
EXACT_NEGATIVE = "Exact negative prompt"
PARAMETER = re.compile(r'\s*([\w][\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True, slots=True)
class Recipe:
    """`parameters` keeps the last line's keys and order; all values are text, as written."""

    prompt: str
    negative_prompt: str = ""
    parameters: dict[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        plain = self._text(self.parameters)
        read = _parse_plain(plain)
        if (read.prompt, read.negative_prompt) == (self.prompt, self.negative_prompt):
            return plain
        exact = {EXACT_PROMPT: self.prompt, EXACT_NEGATIVE: self.negative_prompt}
        return self._text(self.parameters | exact)

    @classmethod
    def from_text(cls, text: str) -> Recipe:
        """The inverse of `to_text`; text of other programs in the same layout is read as well as it can be."""
        read = _parse_plain(text)
        parameters = dict(read.parameters)
        prompt = parameters.pop(EXACT_PROMPT, read.prompt)
        negative_prompt = parameters.pop(EXACT_NEGATIVE, read.negative_prompt)
        return cls(prompt, negative_prompt, parameters)

    def _text(self, parameters: dict[str, str]) -> str:
        negative = f"\n{NEGATIVE}{self.negative_prompt}" if self.negative_prompt else ""
        line = ", ".join(f"{key}: {_quote(value)}" for key, value in parameters.items())
        return f"{self.prompt}{negative}\n{line}"


def recipe_of(request: ImageRequest, seed: int, model: str, steps_skipped: int = 0) -> Recipe:
    """What a picture of the request is drawn from.

    Args:
        steps_skipped: rows that were not run, because the picture started from the latent of a similar one. The same
            settings then draw another picture once that latent is gone.
    """
    parameters = {
        "Steps": str(request.steps),
        "Sampler": SAMPLER_LABELS.get(request.sampler, request.sampler),
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": str(seed),
        "Size": f"{request.width}x{request.height}",
        "Model": model,
    }
    if steps_skipped:
        parameters["Cache"] = f"{steps_skipped} of {request.steps} steps skipped"
    if request.eta:
        parameters["Eta"] = f"{request.eta:g}"
    if request.class_label is not None:
        parameters["Class"] = str(request.class_label)
    if request.timesteps:
        parameters["Timesteps"] = ", ".join(map(str, request.timesteps))
    if request.loras:
        parameters["LoRA"] = ", ".join(f"{name}:{scale:g}" for name, scale in request.loras)
    parameters["Version"] = f"headstart {version()}"
    return Recipe(request.prompt, request.negative_prompt, parameters)


def _parse_plain(text: str) -> Recipe:
    body, _, last = text.rpartition("\n")
    parameters = _parse_line(last)
    if not parameters:
        body = text
    prompt, mark, negative_prompt = body.partition(f"\n{NEGATIVE}")
    if not mark and body.startswith(NEGATIVE):
        prompt, negative_prompt = "", body.removeprefix(NEGATIVE)
    return Recipe(prompt, negative_prompt, parameters)


def _parse_line(line: str) -> dict[str, str]:
    """Keys and values of a parameter line; {} for a line that is not one from start to end."""
    parameters: dict[str, str] = {}
    position = 0
    while position < len(line):
        match = PARAMETER.match(line, position)
        if match is None:
            return {}
        parameters[match[1]] = _unquote(match[2])
        position = match.end()
    return parameters


def _quote(value: str) -> str:
    """As it is where that reads back; else a JSON string."""
    if value == value.strip() and not re.search(r'[,\n"\\]', value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value, strict=False))
        except ValueError:
            return value
    return value.strip()
