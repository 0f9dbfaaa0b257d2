"""Gaussian noise from a counter: any element of any row of any picture, without a stream to keep in step.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key (seed, 0) and counter
(element // 4, row + 1, 0, 0); each call gives four 32-bit words, and Box-Muller makes four normals of them. The
integers are the same on every device, the normals to within float rounding. A picture's noise does not depend on what
else is in the batch.
"""

from __future__ import annotations

import math

import torch

INITIAL_ROW = -1  # the row of the latent that sampling starts from: counter row 0
ENTRY_ROW = 2**32 - 2  # the row of the noise that is added to a latent found elsewhere: the last counter row

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def gaussian(
    seeds: torch.Tensor, row: int | torch.Tensor, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal noise.

    Args:
        seeds: [B] int64 with values of uint32.
        row: index in the full plan, one for all or [B] int64; INITIAL_ROW for the initial latent.
        shape: of one picture, (C, h, w).

    Returns:
        [B, C, h, w] float32 on `device`.
    """
    key = seeds.to(device).view(-1, 1)
    counter_row = torch.as_tensor(row, device=device, dtype=torch.int64).view(-1, 1) + 1
    size = math.prod(shape)
    calls = torch.arange(-(-size // 4), device=device).view(1, -1)
    zero = torch.zeros_like(key)
    words = philox((calls, counter_row, zero, zero), (key, zero))
    normals = torch.stack((*box_muller(words[0], words[1]), *box_muller(words[2], words[3])), dim=-1)
    return normals.view(len(seeds), -1)[:, :size].reshape(len(seeds), *shape)


def philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Philox-4x32-10. Counter and key are int64 tensors with values of uint32, broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps past 2^63, but its 64 bits are right: masking the signed shift gives the high word.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def box_muller(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit words to two independent normals. Box & Muller 1958.

    The uniform under the logarithm is (word + 1/2) / 2^32 in float32: never 0, so a normal is at most 6.8.
    """
    radius = torch.sqrt(-2 * torch.log(first.float() * 2.0**-32 + 2.0**-33))
    angle = second.float() * (2 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)
