"""From what a caller sent to a request the engine can run: defaults filled in, every range checked."""

from __future__ import annotations

import math
from itertools import pairwise

from models.diffusion.model import ModelCard, SamplerDefaults
from service.config import EngineSettings
from service.diffusion.degrees import Degrees
from service.diffusion.request import Draft, ImageRequest
from service.errors import invalid
from service.events import MAX_SEED
from service.prompts import checked_text

Loras = tuple[tuple[str, float], ...]  # (name, scale)

MAX_PICTURES = 8
MIN_SIDE = 64  # pixels, for models whose own pictures are no smaller
MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_LORA_SCALE = 4.0
MAX_PRIORITY = 10
MAX_PARTIAL_IMAGES = 3


def resolve(
    draft: Draft,
    card: ModelCard,
    limits: EngineSettings,
    *,
    id: str,
    random_seed: int,
    degrees: Degrees | None = None,
) -> ImageRequest:
    """Check a draft against the served model and fill in what the caller left out.

    Args:
        id: the request's id.
        random_seed: the seed of a draft that names none (None or -1), 0 to 2**32 - 1.
        degrees: how many GPUs may share a picture; None: there is one.

    Raises:
        InputError: a value out of range; names the HTTP field, the value and what is allowed.
    """
    loras = _loras(draft.loras, card)
    sampler = _sampler(draft.sampler, loras, card)
    defaults = card.defaults(sampler, loras)
    width, height = _size(draft, card, limits)
    timesteps = _timesteps(draft, card, defaults)
    guidance_scale = _guidance(draft.guidance_scale, sampler, defaults)
    return ImageRequest(
        id=id,
        prompt=checked_text("prompt", draft.prompt, 0 if card.max_prompt_tokens is None else 1),
        negative_prompt=checked_text("negative_prompt", draft.negative_prompt or "", 0),
        n=_integer("n", draft.n, 1, 1, MAX_PICTURES),
        width=width,
        height=height,
        steps=_steps(len(timesteps) if timesteps else draft.num_inference_steps, sampler, defaults),
        timesteps=timesteps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        eta=_eta(draft.eta, sampler),
        seed=_seed(draft.seed, random_seed),
        class_label=_class_label(draft.class_label, card),
        loras=loras,
        priority=_integer("priority", draft.priority, 0, -MAX_PRIORITY, MAX_PRIORITY),
        partial_images=_integer("partial_images", draft.partial_images, 0, 0, MAX_PARTIAL_IMAGES),
        deadline_s=_deadline(draft.deadline_s),
        patch_degree=_patch_degree(draft.patch_degree, degrees, sampler, loras, (width, height), guidance_scale),
    )


def _integer(field: str, value: int | None, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise invalid(field, value, f"{low} to {high}")
    return value


def _real(field: str, value: float | None, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    if not low <= value <= high:  # also refuses NaN
        raise invalid(field, value, f"{low:g} to {high:g}")
    return value


def _sampler(value: str | None, loras: Loras, card: ModelCard) -> str:
    """The sampler asked for, else the one that a student's LoRA was made for, else the model's own."""
    students = {name: card.student_loras[name].sampler for name, _ in loras if name in card.student_loras}
    if len(students) > 1:
        raise invalid("loras", list(students), "at most one of them, for each makes another student of the model")
    sampler = next(iter(students.values()), card.default_sampler) if value is None else value
    if sampler not in card.samplers:
        raise invalid("sampler", sampler, f"this model has {', '.join(sorted(card.samplers))}")
    for name, made_for in students.items():
        if sampler != made_for:
            raise invalid("loras", name, f"it was made for the sampler {made_for}, not for {sampler}")
    if card.samplers[sampler].needs_lora and not loras:
        loaded = ", ".join(card.loras)
        raise invalid("sampler", sampler, f"this model runs it only with a LoRA made for it; loaded: {loaded}")
    return sampler


def _steps(value: int | None, sampler: str, defaults: SamplerDefaults) -> int:
    most = MAX_STEPS if defaults.max_steps is None else min(MAX_STEPS, defaults.max_steps)
    if most < MAX_STEPS and value is not None and not 1 <= value <= most:
        raise invalid("num_inference_steps", value, f"1 to {most} with the sampler {sampler}")
    return _integer("num_inference_steps", value, defaults.steps, 1, MAX_STEPS)


def _timesteps(draft: Draft, card: ModelCard, defaults: SamplerDefaults) -> tuple[int, ...]:
    if draft.timesteps is None:
        return ()
    shown = list(draft.timesteps)
    if card.kind != "consistency" or defaults.max_steps is None:
        raise invalid("timesteps", shown, "only a consistency model in pixel space takes them")
    falling = all(after < before for before, after in pairwise(shown))
    if not shown or not falling or shown[-1] != 0 or shown[0] >= defaults.max_steps:
        # 0 is the most noise, where every picture starts.
        allowed = f"integers up to {defaults.max_steps - 1}, strictly decreasing, the last of them 0"
        raise invalid("timesteps", shown, allowed)
    if draft.num_inference_steps not in (None, len(shown)):
        allowed = f"{len(shown)} or nothing: so many timesteps are named"
        raise invalid("num_inference_steps", draft.num_inference_steps, allowed)
    return draft.timesteps


def _guidance(value: float | None, sampler: str, defaults: SamplerDefaults) -> float:
    scale = defaults.guidance_scale
    if defaults.fixed_guidance and value is not None and value != scale:
        allowed = f"{scale:g} or nothing: this network for the sampler {sampler} was distilled at that scale"
        raise invalid("guidance_scale", value, allowed)
    return _real("guidance_scale", value, scale, 0.0, MAX_GUIDANCE)


def _size(draft: Draft, card: ModelCard, limits: EngineSettings) -> tuple[int, int]:
    width = card.default_size[0] if draft.width is None else draft.width
    height = card.default_size[1] if draft.height is None else draft.height
    least = min(MIN_SIDE, *card.default_size)
    for field, side in (("width", width), ("height", height)):
        if side < least or side % card.size_multiple:
            raise invalid(field, side, f"multiples of {card.size_multiple}, from {least} pixels")
    if width * height > limits.max_pixels:
        raise invalid("size", f"{width}x{height}", f"at most {limits.max_pixels} pixels in all")
    return width, height


def _eta(value: float | None, sampler: str) -> float:
    eta = _real("eta", value, 0.0, 0.0, 1.0)
    if eta > 0 and sampler != "ddim":
        raise invalid("eta", eta, f"only the sampler ddim takes it, not {sampler}")
    return eta


def _seed(value: int | None, random_seed: int) -> int:
    if value is None or value == -1:
        return random_seed
    if not 0 <= value <= MAX_SEED:
        raise invalid("seed", value, f"0 to {MAX_SEED}, or -1 for a random one")
    return value


def _class_label(value: int | None, card: ModelCard) -> int | None:
    if card.num_classes is None:
        if value is not None:
            raise invalid("class_label", value, "this model has no classes")
        return None
    if value is None or not 0 <= value < card.num_classes:
        raise invalid("class_label", value, f"this model needs one of 0 to {card.num_classes - 1}")
    return value


def _loras(loras: Loras, card: ModelCard) -> Loras:
    for name, scale in loras:
        if name not in card.loras:
            loaded = f"one of {', '.join(card.loras)}" if card.loras else "this server has loaded none"
            raise invalid("loras", name, loaded)
        if not -MAX_LORA_SCALE <= scale <= MAX_LORA_SCALE:
            raise invalid("loras", scale, f"scales from {-MAX_LORA_SCALE:g} to {MAX_LORA_SCALE:g}")
    names = [name for name, _ in loras]
    if len(set(names)) < len(names):
        raise invalid("loras", names, "each name once")
    return tuple(sorted(loras))


def _patch_degree(
    value: int | None,
    degrees: Degrees | None,
    sampler: str,
    loras: Loras,
    size: tuple[int, int],
    guidance_scale: float,
) -> int:
    if degrees is None:
        if value not in (None, 1):
            raise invalid("patch_degree", value, "1 or nothing: this server draws on one GPU")
        return 1
    return degrees.choose(value, sampler, loras, size, guidance_scale)


def _deadline(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise invalid("deadline_s", value, "a number of seconds above 0")
    return value
