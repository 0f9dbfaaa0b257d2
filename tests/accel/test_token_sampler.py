"""Sampling tokens: against transformers' processors and float64, and the Triton kernel (interpreted here) too."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from accel.kernels.token_sampler import (
    Sampled,
    SamplingRows,
    sample_tokens,
    sample_tokens_reference,
    top_logprobs,
    uniform,
)
from accel.samplers.noise import philox

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel's module is imported
from accel.kernels.token_sampler_triton import sample_tokens_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLERS = [sample_tokens_reference, sample_tokens_triton, sample_tokens]

Sample = Callable[[torch.Tensor, SamplingRows], Sampled]


def rows(count: int, **values: Any) -> SamplingRows:
    """Parameters that leave the distribution as it is, but for those given: one for all rows, or a list."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "positions": 0}
    columns = {**defaults, "seeds": list(range(count)), **values}
    whole = ("top_k", "seeds", "positions")
    tensors = {
        name: torch.as_tensor(value, dtype=torch.int64 if name in whole else torch.float32).expand(count).contiguous()
        for name, value in columns.items()
        if name != "counts"
    }
    counts = columns.get("counts")
    return SamplingRows(
        **{name: tensor.to(DEVICE) for name, tensor in tensors.items()},
        counts=None if counts is None else counts.to(DEVICE),
    )


def taken(params: SamplingRows, which: list[int]) -> SamplingRows:
    values = {field.name: getattr(params, field.name) for field in fields(params)}
    return SamplingRows(**{name: value if value is None else value[which] for name, value in values.items()})


def random_logits(count: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(count, size, generator=torch.Generator().manual_seed(4))).to(DEVICE, dtype)


def every_kind_of_row(size: int) -> SamplingRows:
    """Twelve rows: each parameter alone and together, at its ends and between."""
    generator = torch.Generator().manual_seed(5)
    return rows(
        12,
        temperature=[0, 0, 1, 0.3, 2.5, 1, 1, 0.7, 0.7, 1, 1.3, 0.01],
        top_k=[0, 3, 0, 0, 1, 7, 10**6, 40, 0, 0, 5, 50],
        top_p=[1, 0.5, 1, 1, 1, 1, 1, 1, 0.9, 0.0, 0.8, 0.95],
        min_p=[0, 0, 0, 0.1, 0, 0, 1, 0, 0.02, 0, 0.05, 0],
        repetition_penalty=[1, 1.5, 1, 1, 1.2, 1, 1, 0.8, 1.1, 1, 1.3, 2.0],
        seeds=[0, 1, 2, 3, 4, 5, 2**32 - 1, 7, 8, 9, 10, 11],
        positions=[0, 1, 2, 8191, 4, 5, 6, 7, 8, 9, 2**31, 11],
        counts=torch.randint(0, 3, (12, size), generator=generator, dtype=torch.int32),
    )


def processed_by_transformers(logits: torch.Tensor, seen: list[int] | None = None, **values: Any) -> torch.Tensor:
    """[V] float64 probabilities that transformers would draw from."""
    processors = LogitsProcessorList()
    if "repetition_penalty" in values:
        processors.append(RepetitionPenaltyLogitsProcessor(values["repetition_penalty"]))
    if "temperature" in values:
        processors.append(TemperatureLogitsWarper(values["temperature"]))
    if "top_k" in values:
        processors.append(TopKLogitsWarper(values["top_k"]))
    if "top_p" in values:
        processors.append(TopPLogitsWarper(values["top_p"]))
    if "min_p" in values:
        processors.append(MinPLogitsWarper(values["min_p"]))
    ids = torch.tensor([seen or [0]], device=logits.device)
    return processors(ids, logits[None].clone())[0].double().softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 1000, 10007])
def test_the_kernel_equals_the_reference(size: int, dtype: torch.dtype) -> None:
    logits, params = random_logits(12, size, dtype), every_kind_of_row(size)
    expected, got = sample_tokens_reference(logits, params), sample_tokens_triton(logits, params)
    assert got.tokens.dtype == torch.int64
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_a_row_that_is_greedy_takes_the_likeliest_and_of_equals_the_lowest(sample: Sample) -> None:
    logits = random_logits(3, 9000)
    logits[0, [8999, 8300, 77]] = 50.0
    logits[2] = 0.0
    # Neither the seed nor the other parameters count.
    got = sample(logits, rows(3, temperature=0.0, top_k=5, top_p=0.3, min_p=0.1))
    assert got.tokens.tolist() == [77, int(logits[1].argmax()), 0]


@pytest.mark.parametrize("sample", SAMPLERS)
def test_log_probabilities_are_those_of_the_logits_as_they_came(sample: Sample) -> None:
    logits, params = random_logits(12, 1000), every_kind_of_row(1000)
    got = sample(logits, params)
    expected = logits.double().log_softmax(-1).gather(1, got.tokens[:, None])[:, 0]
    torch.testing.assert_close(got.logprobs.double(), expected, rtol=0, atol=1e-5)


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 2.0},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.06, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("values", CASES, ids=str)
def test_tokens_are_drawn_as_transformers_would(values: dict[str, Any]) -> None:
    """Pearson's chi-squared of the drawn tokens; the limit is passed by chance less than once in ten thousand."""
    draws = 20000
    logits = random_logits(1, 23)[0]
    seen = [2, 2, 5, int(logits.argmax())]
    counts = torch.zeros(1, 23, dtype=torch.int32)
    counts[0, seen] = 1
    if "repetition_penalty" in values:
        values = {**values, "counts": counts.expand(draws, -1)}
    got = sample_tokens_reference(logits.expand(draws, -1), rows(draws, **values)).tokens
    expected = processed_by_transformers(logits, seen, **values).cpu() * draws
    found = torch.bincount(got.cpu(), minlength=23).double()
    assert found[expected == 0].sum() == 0
    common = expected >= 5
    pooled = torch.cat((expected[common], expected[~common].sum()[None]))
    counted = torch.cat((found[common], found[~common].sum()[None]))
    kinds = int((pooled > 0).sum())
    chi_squared = float(((counted - pooled).square() / pooled)[pooled > 0].sum())
    freedom = kinds - 1
    assert chi_squared <= freedom + 4 * (2 * freedom) ** 0.5 + 8


@pytest.mark.parametrize("sample", [sample_tokens_reference, sample_tokens_triton])
def test_what_may_be_drawn_is_cut_where_transformers_cuts(sample: Sample) -> None:
    """The last token of the kept ones, in order of id, is drawn by the largest of the uniform numbers: all but 1."""
    size, count = 3000, 6
    logits = random_logits(1, size)[0]
    order = logits.argsort(descending=True)
    logits = logits[order]  # in order of likelihood, so that the last kept one is also the least likely
    generator = torch.Generator().manual_seed(6)
    top_p = (0.999 * torch.rand(count, generator=generator)).tolist()
    top_k = torch.randint(1, 60, (count,), generator=generator).tolist()
    params = rows(count, top_p=top_p, top_k=top_k, temperature=30.0, seeds=SEED_OF_NEARLY_ONE)
    got = sample(logits.expand(count, -1), params).tokens.tolist()
    for i in range(count):
        kept = processed_by_transformers(logits, temperature=30.0, top_k=top_k[i], top_p=top_p[i]) > 0
        assert got[i] == int(kept.sum()) - 1


def nearly_one() -> int:
    """A seed whose uniform number at position 0 is so near to 1 that of 60 like tokens the last is drawn."""
    seeds = torch.arange(20000)
    return int(uniform(seeds, torch.zeros_like(seeds)).argmax())


SEED_OF_NEARLY_ONE = nearly_one()


@pytest.mark.parametrize("sample", [sample_tokens_reference, sample_tokens_triton])
def test_a_nucleus_of_most_of_a_flat_distribution_is_found(sample: Sample) -> None:
    """More tokens than the reference sorts at first; the last of them is drawn."""
    logits = -torch.arange(4000, device=DEVICE) / 4000
    kept = int((processed_by_transformers(logits, top_p=0.9) > 0).sum())
    assert 3000 < kept < 4000
    assert sample(logits[None], rows(1, top_p=0.9, seeds=SEED_OF_NEARLY_ONE)).tokens.tolist() == [kept - 1]


@pytest.mark.parametrize("sample", SAMPLERS)
def test_a_row_does_not_depend_on_its_neighbours(sample: Sample) -> None:
    logits, params = random_logits(12, 700), every_kind_of_row(700)
    together = sample(logits, params)
    order = [11, 3, 7, 0, 9, 5, 1, 10, 2, 8, 4, 6]
    shuffled = sample(logits[order], taken(params, order))
    assert torch.equal(shuffled.tokens, together.tokens[order])
    for i in range(12):
        assert torch.equal(sample(logits[[i]], taken(params, [i])).tokens, together.tokens[[i]])


@pytest.mark.parametrize("sample", SAMPLERS)
def test_seed_and_position_alone_decide(sample: Sample) -> None:
    logits = torch.zeros(1, 4000, device=DEVICE).expand(4, -1)
    tokens = sample(logits, rows(4, seeds=[1, 1, 2, 1], positions=[3, 3, 3, 4])).tokens.tolist()
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 3


def test_the_uniform_number_is_the_counters() -> None:
    seeds, positions = torch.tensor([9, 2**32 + 9]), torch.tensor([5, 5])
    word = philox(tuple(torch.tensor([v]) for v in (0, 5, 0, 0)), (torch.tensor([9]), torch.tensor([0])))[0]  # type: ignore[arg-type]
    assert uniform(seeds, positions).tolist() == [(int(word) >> 8) / 2**24] * 2


def test_uniform_numbers_fill_the_unit_interval() -> None:
    """Kolmogorov-Smirnov over seeds and over positions; 1.95 / sqrt(n) is exceeded by chance once in a thousand."""
    many, one = torch.arange(20000), torch.full((20000,), 3)
    steps = torch.arange(20001, dtype=torch.float64) / 20000
    for numbers in (uniform(many, one), uniform(one, many)):
        assert 0 <= numbers.min() <= numbers.max() < 1
        ordered = numbers.double().sort().values
        distance = torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max())
        assert distance < 1.95 / 20000**0.5


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forbidden_token_is_never_drawn(sample: Sample, temperature: float) -> None:
    logits = torch.full((8, 300), -torch.inf, device=DEVICE)
    logits[:, [7, 250]] = torch.tensor([-1000.0, -1000.0], device=DEVICE)
    got = sample(logits, rows(8, temperature=temperature, top_p=0.99, top_k=20))
    assert set(got.tokens.tolist()) == ({7} if temperature == 0 else {7, 250})
    torch.testing.assert_close(got.logprobs, torch.full_like(got.logprobs, -0.6931472))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_show_in_their_own_row_alone(sample: Sample, wrong: float) -> None:
    logits, params = random_logits(12, 600), every_kind_of_row(600)
    expected = sample(logits, params).tokens
    for row in (1, 3, 8, 10):
        logits[row, slice(None) if wrong == -torch.inf else 500] = wrong
    got = sample(logits, params)
    assert got.logprobs.isfinite().logical_not().nonzero().flatten().tolist() == [1, 3, 8, 10]
    assert got.tokens.min() >= 0
    assert got.tokens.max() < 600
    right = [0, 2, 4, 5, 6, 7, 9, 11]
    assert torch.equal(got.tokens[right], expected[right])


def test_the_likeliest_tokens_come_with_their_log_probabilities() -> None:
    logits = random_logits(3, 100)
    tokens, logprobs = top_logprobs(logits, 5)
    expected = logits.double().log_softmax(-1).sort(descending=True)
    assert torch.equal(tokens, expected.indices[:, :5])
    torch.testing.assert_close(logprobs.double(), expected.values[:, :5], rtol=0, atol=1e-5)
    assert logprobs.dtype == torch.float32


def test_rows_may_be_a_slice_of_wider_ones() -> None:
    wide, params = random_logits(12, 130), every_kind_of_row(100)
    expected = sample_tokens_reference(wide[:, 20:120].contiguous(), params)
    assert torch.equal(sample_tokens_triton(wide[:, 20:120], params).tokens, expected.tokens)
