"""Streams of a device: work issued on one does not wait for what is issued on others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

URGENT = -1  # torch's high priority; streams have 0 unless told otherwise


def urgent_stream(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """A stream of its own, ahead of the default one: what is issued within the result, in any thread, goes there.

    The device runs its blocks first whenever there is room for new ones, so that short memory-bound work finds its way
    between those of long compute-bound work. It begins after what has been issued so far. A CPU has no streams: there
    the result does nothing.
    """
    if device.type != "cuda":
        return contextlib.nullcontext
    stream = torch.cuda.Stream(device, priority=URGENT)
    stream.wait_stream(torch.cuda.current_stream(device))
    return partial(torch.cuda.stream, stream)
