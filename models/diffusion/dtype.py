"""Where a model runs and in which number format, when the user leaves it to us."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.errors import ModelError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPEATS = 8
WORTHWHILE = 1.2  # bfloat16 must be this much faster than float32 to be worth its rounding


def resolve_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device that exists; ModelError otherwise."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ModelError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N")
    index = device.index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ModelError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices are visible")
    return torch.device("cuda", index)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn "auto" or a dtype's name into a dtype. "auto" is bfloat16 where the device is fast at it."""
    if name != "auto":
        if name not in DTYPES:
            raise ModelError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if _cpu_is_fast_at_bfloat16() else torch.float32


def _cpu_is_fast_at_bfloat16() -> bool:
    """Time a convolution and a matrix product of a UNet's size in both formats: some tens of milliseconds.

    The formats take turns and the fastest run of each counts: other processes only ever make a run slower.
    """
    runs = [_workload(dtype) for dtype in (torch.float32, torch.bfloat16)]
    for run in runs:
        run()
    rounds = [(_seconds(runs[0]), _seconds(runs[1])) for _ in range(REPEATS)]
    single, brain = min(first for first, _ in rounds), min(second for _, second in rounds)
    logger.info("bfloat16 check: float32 %.2f ms, bfloat16 %.2f ms", 1e3 * single, 1e3 * brain)
    return single / brain >= WORTHWHILE


def _workload(dtype: torch.dtype) -> Callable[[], None]:
    image = torch.ones(2, 64, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.ones(64, 64, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    left, right = torch.ones(512, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)

    def run() -> None:
        F.conv2d(image, kernel, padding=1)
        left @ right

    return run


@torch.no_grad()
def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
