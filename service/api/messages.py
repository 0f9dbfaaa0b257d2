"""The streamed messages that OpenAI's clients know."""

from __future__ import annotations

import base64
import time
from typing import Any

from service.api.drawing import Job
from service.diffusion.request import Partial


def image_message(job: Job, data: bytes) -> dict[str, Any]:
    """A finished picture."""
    return {"type": "image_generation.completed"} | _common(job, data)


def partial_message(job: Job, partial: Partial, data: bytes) -> dict[str, Any]:
    """A preview of a picture that is still being drawn."""
    return {"type": "image_generation.partial_image", "partial_image_index": partial.number} | _common(job, data)


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _common(job: Job, data: bytes) -> dict[str, Any]:
    return {
        "b64_json": base64_text(data),
        "created_at": int(time.time()),
        "size": job.size,
        "output_format": job.format,
        "background": "opaque",
        "quality": "auto",
    }
