"""The only code that touches the model: a batch of the scheduler becomes tensors, logits, and one token an output.

A batch in which every sequence has one token, as most have, runs from static buffers through a captured graph.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from accel.attention.batch import TokenBatch
from accel.graphs import BucketGraphs, bucket_sizes
from accel.kernels.token_sampler import SamplingRows, sample_tokens, top_logprobs
from models.llm.loading import LanguageModel
from service.errors import HeadstartError, NonFiniteError, OutOfMemoryError
from service.faults import explained
from service.llm.memory import KvMemory
from service.llm.request import Sequence, TokenLogprob
from service.llm.scheduler import Batch, Chunk

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What a chunk led to: a token for each of its outputs; with an error, tokens that mean nothing."""

    chunk: Chunk
    draws: tuple[TokenLogprob, ...]
    error: HeadstartError | None = None


class Arrays(NamedTuple):
    """A batch's integers on the host. B sequences, T tokens, R rows whose logits are wanted."""

    tokens: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    places: np.ndarray  # [T] int64, -1: not written
    addresses: np.ndarray  # [B, ...] int32
    starts: np.ndarray  # [B + 1] int32
    lengths: np.ndarray  # [B] int32
    last: np.ndarray  # [R] int64


class Runner:
    """A model and the memory of the running sequences.

    Args:
        max_decodes: the most sequences that one batch of single tokens has.
    """

    def __init__(self, model: LanguageModel, memory: KvMemory, max_decodes: int) -> None:
        self._decoder = model.decoder
        self._memory = memory
        self._device = model.decoder.device
        self._vocab_size = model.config.vocab_size
        self._static = _Static.empty(max_decodes, memory.address_shape, self._device)
        self._sampled: list[Sequence] = []  # of the last batch, and what they asked for
        self._asked = self._ask([])
        self._graphs = BucketGraphs(self._decode, bucket_sizes(max_decodes), self._device)
        with torch.inference_mode():
            self._graphs.capture()

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Outcome]:
        """Compute the batch; an outcome for each chunk, in order. Parts run by themselves when memory runs out."""
        try:
            self._memory.prepare(batch)
        except Exception as error:
            reason = explained(error, "moving keys and values")
            return [_failed(chunk, reason) for chunk in batch.chunks]
        return self._compute(batch.chunks)

    def _compute(self, chunks: Items[Chunk]) -> list[Outcome]:
        try:
            logits = self._logits(chunks)
            return self._draw(chunks, logits)
        except Exception as error:
            reason = explained(error, "a pass of the language model")
        if isinstance(reason, OutOfMemoryError) and len(chunks) > 1:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            half = len(chunks) // 2
            log.warning("out of memory: %d sequences run in two parts", len(chunks))
            return [outcome for part in (chunks[:half], chunks[half:]) for outcome in self._compute(part)]
        return [_failed(chunk, reason) for chunk in chunks]

    def _logits(self, chunks: Items[Chunk]) -> torch.Tensor:
        """[R, V] float32: a row for each chunk with outputs."""
        arrays = self._arrays(chunks)
        count = len(chunks)
        bucket = self._graphs.bucket(count) if len(arrays.tokens) == count == len(arrays.last) else None
        if bucket is None:
            return self._pass(arrays, sum(chunk.count == 1 for chunk in chunks))
        self._static.fill(arrays, bucket, self._send)
        return self._graphs(bucket)[:count]

    def _pass(self, arrays: Arrays, decodes: int) -> torch.Tensor:
        tokens, positions, places, addresses, starts, lengths, last = (self._send(array) for array in arrays)
        attend = self._memory.attend(addresses, places, starts, lengths, decodes)
        logits: torch.Tensor = self._decoder(TokenBatch(tokens, positions, last, attend))
        return logits

    def _decode(self, size: int) -> torch.Tensor:
        """A pass over the first rows of the static buffers, one token a sequence."""
        rows = self._static
        attend = self._memory.attend(
            rows.addresses[:size], rows.places[:size], rows.rows[: size + 1], rows.lengths[:size], size
        )
        batch = TokenBatch(rows.tokens[:size], rows.positions[:size], rows.rows[:size], attend)
        logits: torch.Tensor = self._decoder(batch)
        return logits

    def _arrays(self, chunks: Items[Chunk]) -> Arrays:
        counts = np.array([chunk.count for chunk in chunks])
        begins = np.array([chunk.start for chunk in chunks])
        ends = counts.cumsum()
        rows = np.repeat(np.arange(len(chunks)), counts)
        positions = np.arange(ends[-1]) - np.repeat(ends - counts - begins, counts)
        tokens = [token for chunk in chunks for token in chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]]
        addresses = self._memory.addresses(chunks)
        return Arrays(
            tokens=np.array(tokens),
            positions=positions,
            places=self._memory.places(addresses, rows, positions),
            addresses=addresses,
            starts=np.concatenate([[0], ends]).astype(np.int32),
            lengths=(begins + counts).astype(np.int32),
            last=ends[[bool(chunk.outputs) for chunk in chunks]] - 1,
        )

    def _draw(self, chunks: Items[Chunk], logits: torch.Tensor) -> list[Outcome]:
        """Sample for every output. The choices that fork at a chunk draw from the same logits."""
        receivers = [sequence for chunk in chunks for sequence in chunk.outputs]
        if not receivers:
            return [Outcome(chunk, ()) for chunk in chunks]
        if len(receivers) > len(logits):
            widths = [len(chunk.outputs) for chunk in chunks if chunk.outputs]
            logits = logits.repeat_interleave(self._send(np.array(widths)), dim=0)
        sampled = sample_tokens(logits, self._sampling(receivers))
        tops = _alternatives(logits, receivers)
        logprobs = sampled.logprobs.tolist()
        finite = math.isfinite(sum(logprobs))
        draws = iter(list(map(TokenLogprob, sampled.tokens.tolist(), logprobs, tops)))
        outcomes = [Outcome(chunk, tuple(itertools.islice(draws, len(chunk.outputs)))) for chunk in chunks]
        return outcomes if finite else [_checked(outcome) for outcome in outcomes]

    def _sampling(self, sequences: list[Sequence]) -> SamplingRows:
        """What each sequence asks for. The position that its noise is drawn for is that of the new token."""
        if sequences != self._sampled:  # most batches are those before, one token later
            self._sampled, self._asked = sequences, self._ask(sequences)
        positions = np.array([len(sequence.tokens) for sequence in sequences])
        penalised = any(sequence.request.params.repetition_penalty != 1 for sequence in sequences)
        counts = self._counts(sequences) if penalised else None
        return replace(self._asked, positions=self._send(positions), counts=counts)

    def _ask(self, sequences: list[Sequence]) -> SamplingRows:
        params = [sequence.request.params for sequence in sequences]

        def floats(values: Iterable[float]) -> torch.Tensor:
            return self._send(np.fromiter(values, np.float32, len(params)))

        def integers(values: Iterable[int]) -> torch.Tensor:
            return self._send(np.fromiter(values, np.int64, len(params)))

        return SamplingRows(
            temperature=floats(p.temperature for p in params),
            top_k=integers(p.top_k for p in params),
            top_p=floats(p.top_p for p in params),
            min_p=floats(p.min_p for p in params),
            repetition_penalty=floats(p.repetition_penalty for p in params),
            seeds=integers(sequence.seed for sequence in sequences),
            positions=integers(0 for _ in sequences),
        )

    def _counts(self, sequences: Items[Sequence]) -> torch.Tensor:
        """[B, V] int32: how often each token stands in a sequence, its prompt included; zeros where nothing asks."""
        counts = torch.zeros(len(sequences), self._vocab_size, dtype=torch.int32, device=self._device)
        for row, sequence in zip(counts, sequences, strict=True):
            if sequence.request.params.repetition_penalty != 1:
                tokens = self._send(np.array(sequence.tokens))
                row.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))
        return counts

    def _send(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Static:
    """Buffers that captured graphs read: one token each of up to `most` sequences."""

    tokens: torch.Tensor  # [most] int64
    positions: torch.Tensor  # [most] int64
    places: torch.Tensor  # [most] int64
    addresses: torch.Tensor  # [most, ...] int32
    lengths: torch.Tensor  # [most] int32
    rows: torch.Tensor  # [most + 1] int64, counting up: each sequence's token is its only one

    @classmethod
    def empty(cls, most: int, address_shape: tuple[int, ...], device: torch.device) -> _Static:
        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(most, *shape, dtype=dtype, device=device)

        return cls(
            tokens=zeros(torch.int64),
            positions=zeros(torch.int64),
            places=zeros(torch.int64) - 1,
            addresses=zeros(torch.int32, *address_shape),
            lengths=zeros(torch.int32),
            rows=torch.arange(most + 1, device=device),
        )

    def fill(self, arrays: Arrays, size: int, send: Callable[[np.ndarray], torch.Tensor]) -> None:
        """Write a batch to the first rows, and to those after it, up to `size`, what is read and written by no one."""
        count = len(arrays.tokens)
        for buffer, array in (
            (self.tokens, arrays.tokens),
            (self.positions, arrays.positions),
            (self.places, arrays.places),
            (self.lengths, arrays.lengths),
        ):
            buffer[:count].copy_(send(array), non_blocking=True)
        width = arrays.addresses.shape[1:]
        self.addresses[(slice(count), *map(slice, width))].copy_(send(arrays.addresses), non_blocking=True)
        self.places[count:size] = -1
        self.lengths[count:size] = 0


def _alternatives(logits: torch.Tensor, sequences: Items[Sequence]) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest tokens and their log-probabilities, as many as each sequence asks for."""
    wanted = [sequence.request.params.logprobs or 0 for sequence in sequences]
    if not any(wanted):
        return [()] * len(wanted)
    tokens, logprobs = (tensor.tolist() for tensor in top_logprobs(logits, min(max(wanted), logits.shape[1])))
    return [tuple(zip(ids, values, strict=True))[:n] for ids, values, n in zip(tokens, logprobs, wanted, strict=True)]


def _checked(outcome: Outcome) -> Outcome:
    if all(math.isfinite(draw.logprob) for draw in outcome.draws):
        return outcome
    error = NonFiniteError("the language model's logits are not finite", code="non_finite_logits")
    return outcome._replace(error=error)


def _failed(chunk: Chunk, error: HeadstartError) -> Outcome:
    return Outcome(chunk, (TokenLogprob(0, 0.0),) * len(chunk.outputs), error)
