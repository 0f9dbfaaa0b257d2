"""What a caller is told when a model or its device fails."""

from __future__ import annotations

import logging

import torch

from models.errors import ModelError
from service.errors import HeadstartError, OutOfMemoryError

log = logging.getLogger(__name__)

NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of drivers, the CPU's allocator, cuBLAS
NO_PRIMITIVE = "could not create a primitive"  # oneDNN's whole message where it found no memory for a kernel


def explained(error: Exception, doing: str) -> HeadstartError:
    """What a caller is told about an exception; the log gets the rest.

    Raises:
        torch.AcceleratorError: the device itself has failed, and with it everything that this process has on it.
    """
    if isinstance(error, HeadstartError):
        return error
    signs = str(error) == NO_PRIMITIVE or any(sign in str(error) for sign in NO_MEMORY)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or signs:
        return OutOfMemoryError(f"out of memory in {doing}")
    if isinstance(error, torch.AcceleratorError):
        raise error
    if isinstance(error, ModelError):
        return HeadstartError(f"{doing} failed: {error}")
    log.error("%s failed", doing, exc_info=error)
    return HeadstartError(f"{doing} failed: {type(error).__name__}")
