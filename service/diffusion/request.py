"""A request, the pictures it asks for, and what the engine says about them. No torch."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field

from service import events
from service.errors import invalid
from service.events import Cancelled, Failed, Started

# What the cache can fail to do for a request, which then is drawn all the same: a "lookup" failed, was "late", or found
# an "unusable" start; "marks", the choice of latents to keep, failed; to "keep" them failed; or too many of them were
# waiting for that, the "backlog".
CACHE_FAULTS = ("lookup", "late", "unusable", "marks", "keep", "backlog")


class State(enum.StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (State.COMPLETED, State.FAILED, State.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a caller asked for, types checked, ranges not. None: the caller left it out."""

    prompt: str
    negative_prompt: str | None = None
    n: int | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    timesteps: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    eta: float | None = None
    seed: int | None = None  # None or -1: random, and told in the reply
    class_label: int | None = None
    loras: tuple[tuple[str, float], ...] = ()
    priority: int | None = None
    partial_images: int | None = None
    deadline_s: float | None = None
    patch_degree: int | None = None


def parse_size(field: str, size: str, allowed: str) -> tuple[int, int]:
    """(width, height) of "256x256", pixels. Raises InputError in the words of the caller."""
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", size)
    if match is None:
        raise invalid(field, size, allowed)
    return int(match[1]), int(match[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheIntent:
    """What the approximate cache may do for a request: look for latents to start from, store the request's own."""

    embedding: object = field(repr=False, compare=False)  # of the prompt: [D] float32 numpy array, unit norm
    look: bool
    store: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """A checked request: every field is within the served model's limits and no field is left to default.

    Made by `service.diffusion.admission.resolve` from what a caller sent; picture i uses seed + i (modulo 2**32).
    """

    id: str
    prompt: str
    negative_prompt: str
    n: int
    width: int  # pixels
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    eta: float
    seed: int
    timesteps: tuple[int, ...] = ()  # of a pixel-space consistency model, instead of an even spread of the steps
    class_label: int | None = None
    loras: tuple[tuple[str, float], ...] = ()  # (name, scale), sorted by name
    priority: int = 0  # higher runs earlier; -10 to 10
    partial_images: int = 0  # previews per picture
    deadline_s: float | None = None  # seconds from arrival; None: no deadline
    patch_degree: int = 1  # GPUs that share each picture
    tenant: str = ""  # whose latents and remembered prompts it shares
    cache: CacheIntent | None = None  # None: the cache is bypassed


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings(events.Timings):
    """Seconds. `denoise_s` and `decode_s` are wall time in that stage, shared ticks counted whole."""

    encode_s: float = 0.0
    lookup_s: float = 0.0  # in the approximate cache
    denoise_s: float = 0.0
    decode_s: float = 0.0
    patch_degree: int = 1  # no seconds: how many GPUs shared each picture, which explains them


# What engine.step() returns, in order, beside Started, Failed and Cancelled (service.events).


@dataclass(frozen=True, slots=True)
class Progress:
    """Picture `index` has run `step` of `steps` rows."""

    request_id: str
    index: int
    step: int
    steps: int

    def merged(self, earlier: events.Event) -> Progress | None:
        """The latest tells all."""
        return self if isinstance(earlier, Progress) and earlier.index == self.index else None


@dataclass(frozen=True, slots=True)
class Partial:
    """A preview of picture `index`: [H, W, 3] uint8 as a numpy array."""

    request_id: str
    index: int
    number: int  # 0-based
    pixels: object = field(repr=False)


@dataclass(frozen=True, slots=True)
class Image:
    """Picture `index` is done: [H, W, 3] uint8 as a numpy array, and what it took.

    `cache_result`: "hit" if it started from a latent of a prompt of that `similarity`, "miss" if none was found,
    "bypass" if none was looked for.
    """

    request_id: str
    index: int
    seed: int
    pixels: object = field(repr=False)
    steps_run: int = 0
    steps_skipped: int = 0
    evaluations: int = 0
    cache_result: str = "bypass"
    similarity: float | None = None


@dataclass(frozen=True, slots=True)
class Completed(events.Completed):
    """`warnings` say what of the request had no effect."""

    timings: Timings
    warnings: tuple[str, ...] = ()


Event = Started | Progress | Partial | Image | Completed | Failed | Cancelled
