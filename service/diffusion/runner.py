"""The only code that touches the model: encode, begin, run, copy, preview, decode. Called from the engine's thread.

`run` queues work and does not wait for the device, except to keep the host from racing more than two ticks ahead of it.
`copy` queues a copy to the host behind it. `preview` and `decode` wait: they bring pictures to the host.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from accel.kernels.sampler_step import sampler_step
from accel.memory.latents import LatentSlots
from accel.samplers.library import renoise
from accel.samplers.noise import ENTRY_ROW, INITIAL_ROW, gaussian
from models.diffusion.denoiser import to_device
from models.diffusion.model import Condition, Denoiser, DiffusionModel, as_array
from service.diffusion.orders import Network
from service.diffusion.picture import Arriving, Bucket, Picture, Tick
from service.diffusion.ranks import Ranks
from service.diffusion.request import ImageRequest
from service.diffusion.staging import StagedRows, Staging
from service.errors import HeadstartError, NonFiniteError, OutOfMemoryError
from service.faults import explained

log = logging.getLogger(__name__)

CEILING_TICKS = 1000  # a batch ceiling is tried again after so many ticks: the memory's other user may have left


class Outcome(NamedTuple):
    """What became of a tick's pictures: those whose latents advanced, and those that failed, each with its reason."""

    advanced: list[Picture]
    failed: list[tuple[Picture, HeadstartError]]


class Runner:
    """A model and the latents of the running pictures.

    Args:
        latents: where they live; slots are taken and given back by the scheduler.
        max_batch: pictures of one tick at most.
        ranks: the group of GPUs that this process leads; None: it runs all by itself.
    """

    def __init__(self, model: DiffusionModel, latents: LatentSlots, max_batch: int, ranks: Ranks | None = None) -> None:
        self._model = model
        self._latents = latents
        self._ranks = ranks
        self._staging = Staging(max_batch, model.device)
        self._networks: dict[str, tuple[Denoiser, Network]] = {}  # Network: of the first request that ran on it
        self._ceilings: dict[tuple[str, tuple[int, ...], int], int] = {}  # network rows, after running out of memory
        self._ticks = 0

    def bucket(self, request: ImageRequest) -> Bucket:
        """The bucket in which the request's pictures run."""
        card, loras = self._model.card, request.loras
        denoiser = self._model.denoiser(request.sampler, loras)
        name = next((name for name, (other, _) in self._networks.items() if other is denoiser), None)
        if name is None:
            name = "+".join([request.sampler, *(lora for lora, _ in loras)])
            self._networks[name] = denoiser, (request.sampler, loras)
        shape = (card.latent_channels, request.height // card.scale, request.width // card.scale)
        return Bucket(name, shape, loras, request.patch_degree)

    @torch.inference_mode()
    def encode(self, requests: Sequence[ImageRequest]) -> list[Condition]:
        """Encode requests of one tenant, sampler, size and LoRA set in one batch.

        Raises:
            HeadstartError: the batch failed; nothing is known of its members.
        """
        first = requests[0]
        try:
            self._model.use_loras(first.loras)
            conditions = self._model.encode(
                [(request.prompt, request.negative_prompt) for request in requests],
                [request.guidance_scale for request in requests],
                first.sampler,
                (first.width, first.height),
                first.tenant,
            )
        except Exception as error:
            reason = explained(error, "encoding the prompt")
        else:
            return [
                replace(condition, class_label=request.class_label)
                for condition, request in zip(conditions, requests, strict=True)
            ]
        raise reason  # out here it does not hold the frames, and with them the memory, of what failed

    @torch.inference_mode()
    def begin(self, pictures: Sequence[Picture]) -> None:
        """Put the initial latents of pictures that were just given slots into them.

        Without a start that is gaussian(seed) * init_scale; with one, its latent, with as much noise added as takes it
        to the level of the picture's first row.
        """
        for batch in _by_shape(pictures):
            shape = batch[0].bucket.shape
            x, _, _ = self._latents.tensors(shape)
            seeds = self._send([picture.seed for picture in batch])
            rows = self._send([INITIAL_ROW if picture.start is None else ENTRY_ROW for picture in batch])
            kept, fresh = zip(*map(_mixture, batch), strict=True)
            noise = gaussian(seeds, rows, shape, self._model.device)
            x[self._slots(batch)] = noise * self._send(fresh).view(-1, 1, 1, 1)
            for picture, scale in zip(batch, kept, strict=True):
                if picture.start is not None:
                    latent = torch.from_numpy(scale * picture.start.latent.astype(np.float32))
                    x[picture.slot] += to_device(latent, self._model.device)

    def run(self, tick: Tick) -> Outcome:
        """Advance the tick's pictures by one row, splitting the batch when memory runs out.

        The latents of a part are written after all that can fail in it, so that a failed part has not moved.
        """
        self._ticks += 1
        if self._ticks % CEILING_TICKS == 0:
            self._ceilings.clear()
        kind = (tick.bucket.network, tick.bucket.shape, tick.bucket.degree)
        outcome = Outcome([], [])
        left = tick.pictures
        while left:
            part = _fitting(left, self._ceilings.get(kind))
            error = self._advance(tick.bucket, part)
            if error is None:
                outcome.advanced.extend(part)
            elif isinstance(error, OutOfMemoryError) and len(part) > 1 and self._works_on():
                self._free_memory()
                self._ceilings[kind] = sum(picture.evaluations for picture in part) // 2
                log.warning("out of memory: %s runs %d network rows at once from now on", kind, self._ceilings[kind])
                continue
            else:
                outcome.failed.extend((picture, error) for picture in part)
            left = left[len(part) :]
        return outcome

    @torch.inference_mode()
    def _advance(self, bucket: Bucket, pictures: list[Picture]) -> HeadstartError | None:
        conditions = [picture.condition for picture in pictures if picture.condition is not None]
        try:
            self._model.use_loras(bucket.loras)
            x, previous, finite = self._latents.tensors(bucket.shape)
            batch = self._staging.send(pictures)
            denoised = self._denoised(bucket, pictures, x, batch, conditions)
            sampler_step(x, previous, batch.slots, denoised, batch.coefficients, batch.seeds, batch.rows, finite)
        except Exception as error:
            return explained(error, "a denoising step")
        finally:
            self._staging.mark()
        return None

    def _denoised(
        self,
        bucket: Bucket,
        pictures: Sequence[Picture],
        x: torch.Tensor,
        batch: StagedRows,
        conditions: Sequence[Condition],
    ) -> torch.Tensor:
        denoiser, network = self._networks[bucket.network]
        rows = x[batch.slots], batch.t, batch.alpha, conditions
        if self._ranks is None:
            return denoiser(*rows)
        slots, ran = [picture.slot for picture in pictures], [picture.cursor for picture in pictures]
        return self._ranks.evaluate(network, bucket.loras, bucket.degree, *rows, slots, ran)

    def _works_on(self) -> bool:
        """Whether latents are as they were before memory ran out, and another call can be made."""
        if self._ranks is None or self._ranks.lost is None:
            return True
        if not self._ranks.intact:
            return False
        try:
            self._ranks.restart()
        except HeadstartError:
            log.exception("the ranks cannot go on after one was without memory")
            return False
        return True

    @torch.inference_mode()
    def copy(self, pictures: Sequence[Picture]) -> list[Arriving]:
        """Send these pictures' latents to the host, [C, h, w] float16 each. One shape.

        The copies are of the latents as they are now, whatever is queued after. None at all if there is no memory.
        """
        x, _, _ = self._latents.tensors(pictures[0].bucket.shape)
        try:
            halves = x[self._slots(pictures)].half()
            if self._model.device.type == "cpu":
                return [latent.numpy for latent in halves]
            host = torch.empty(halves.shape, dtype=torch.float16, pin_memory=True)
            host.copy_(halves, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._model.device))
        except Exception as error:
            log.warning("latents are not kept: %s", explained(error, "copying latents").message)
            return []
        return [partial(_arrived, latent, arrived) for latent in host]

    def preview(self, pictures: Sequence[Picture]) -> list[np.ndarray | HeadstartError]:
        """Cheap pictures of the last estimates of x0, [H, W, 3] uint8 each, or why there is none. One shape."""
        _, previous, finite = self._latents.tensors(pictures[0].bucket.shape)
        return self._render(pictures, previous, finite, self._model.preview)

    def decode(self, pictures: Sequence[Picture]) -> list[np.ndarray | HeadstartError]:
        """Final pictures, [H, W, 3] uint8 each, or why there is none. One shape."""
        bucket = pictures[0].bucket
        x, _, finite = self._latents.tensors(bucket.shape)
        draw = self._model.decode
        if self._ranks is not None and bucket.degree > 1 and bucket.shape[1] % bucket.degree == 0:
            draw = partial(self._ranks.decode, bucket.degree)
        return self._render(pictures, x, finite, draw)

    def wait(self) -> None:
        """Until the device has run every tick it was given."""
        self._staging.wait()

    @torch.inference_mode()
    def _render(
        self,
        pictures: Sequence[Picture],
        latents: torch.Tensor,
        finite: torch.Tensor,
        draw: Callable[[torch.Tensor], torch.Tensor],
    ) -> list[np.ndarray | HeadstartError]:
        try:
            slots = self._slots(pictures)
            arrays = as_array(draw(latents[slots]))
            flags = finite[slots].tolist()
        except Exception as error:
            reason = explained(error, "decoding")
        else:
            if self._ranks is not None and self._ranks.lost is not None:  # what came from them need not be right
                return [self._ranks.lost] * len(pictures)
            return [
                array if flag else NonFiniteError(f"the latents of picture {picture.index} are not finite")
                for picture, array, flag in zip(pictures, arrays, flags, strict=True)
            ]
        if isinstance(reason, OutOfMemoryError) and len(pictures) > 1 and self._works_on():
            self._free_memory()
            half = len(pictures) // 2
            return [
                result
                for part in (pictures[:half], pictures[half:])
                for result in self._render(part, latents, finite, draw)
            ]
        return [reason] * len(pictures)

    def _slots(self, pictures: Sequence[Picture]) -> torch.Tensor:
        return self._send([picture.slot for picture in pictures])

    def _send(self, values: Sequence[float]) -> torch.Tensor:
        return to_device(torch.tensor(values), self._model.device)

    def _free_memory(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()


def _mixture(picture: Picture) -> tuple[float, float]:
    """What a picture begins with: so much of the latent that was found for it, and so much noise."""
    if picture.start is None:
        return 0.0, picture.plan.init_scale
    return renoise(picture.start.alpha, picture.row.alpha)


def _arrived(latent: torch.Tensor, arrived: torch.cuda.Event) -> np.ndarray:
    """The copy on the host, in memory that is not pinned."""
    arrived.synchronize()
    return latent.numpy().copy()


def _by_shape(pictures: Sequence[Picture]) -> list[list[Picture]]:
    groups: dict[tuple[int, ...], list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.bucket.shape, []).append(picture)
    return list(groups.values())


def _fitting(pictures: list[Picture], ceiling: int | None) -> list[Picture]:
    """As many of the first pictures as the ceiling's network rows allow, at least one."""
    if ceiling is None:
        return pictures
    rows = itertools.accumulate(picture.evaluations for picture in pictures)
    return pictures[: max(1, sum(total <= ceiling for total in rows))]
