"""The counter-based generator: published vectors, distribution, and independence from the batch."""

from __future__ import annotations

import math

import pytest
import torch

from accel.samplers.noise import INITIAL_ROW, gaussian, philox

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
MAX = 0xFFFFFFFF


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MAX,) * 4, (MAX, MAX), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    result = philox(words(*counter), words(*key))  # type: ignore[arg-type]
    assert tuple(int(word) for word in result) == expected


def test_an_element_comes_from_its_counter() -> None:
    """Element 6 of row 2 is the third normal of the call with counter (1, 3, 0, 0)."""
    noise = gaussian(torch.tensor([9]), 2, (1, 3, 3)).flatten()
    first, second = (int(word) for word in philox(words(1, 3, 0, 0), words(9, 0))[2:])  # type: ignore[arg-type]
    radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
    assert noise[6].item() == pytest.approx(radius * math.cos(2 * math.pi * second / 2**32), rel=1e-5)


def test_the_distribution_is_standard_normal() -> None:
    noise = gaussian(torch.arange(16), INITIAL_ROW, (4, 64, 64)).flatten().double()
    count = len(noise)
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((noise**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / count)
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is exceeded by chance once in a thousand.
    cumulative = 0.5 * (1 + torch.erf(noise.sort().values / math.sqrt(2)))
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((cumulative - steps[:-1]).abs().max(), (cumulative - steps[1:]).abs().max())
    assert distance < 1.95 / math.sqrt(count)


def test_seeds_rows_and_elements_are_uncorrelated() -> None:
    size = 4 * 64 * 64
    draws = [
        gaussian(torch.tensor([seed]), row, (4, 64, 64)).flatten() for seed in (0, 1, 2**32 - 1) for row in (-1, 0, 7)
    ]
    draws.append(draws[0].roll(1))
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / math.sqrt(size)
    lags = [torch.dot(draws[0], draws[0].roll(lag)) / size for lag in (1, 2, 3, 4, 64)]
    assert max(abs(lag) for lag in lags) < 5 / math.sqrt(size)


@pytest.mark.parametrize("shape", [(4, 32, 32), (3, 5, 7), (1, 1, 1), (4, 9, 13)])
def test_a_picture_has_the_same_bits_in_any_batch(shape: tuple[int, int, int]) -> None:
    seeds, rows = torch.tensor([5, 2**32 - 1, 0, 77, 5]), torch.tensor([3, 0, -1, 49, 4])
    together = gaussian(seeds, rows, shape)
    assert together.shape == (5, *shape)
    assert together.dtype == torch.float32
    for i in range(5):
        assert torch.equal(gaussian(seeds[i : i + 1], int(rows[i]), shape)[0], together[i])
    assert torch.equal(gaussian(seeds.flip(0), rows.flip(0), shape).flip(0), together)
    assert not torch.equal(together[0], together[4])


def test_a_smaller_picture_is_a_prefix() -> None:
    """Only an element's index counts, not the shape it belongs to."""
    small, large = (gaussian(torch.tensor([3]), 0, shape).flatten() for shape in ((1, 3, 5), (4, 8, 8)))
    assert torch.equal(small, large[: len(small)])
