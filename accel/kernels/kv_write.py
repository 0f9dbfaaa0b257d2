"""Writing the keys and values of new tokens to their places in the cache."""

from __future__ import annotations

import torch

from accel.kernels.choice import use_triton


def kv_write(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """Row i of k and v goes to row slots[i] of the cache; a row with a negative slot is skipped.

    Args:
        k, v: [T, Hkv, D]; at any stride (slices of a fused projection).
        keys, values: [..., Hkv, D] whose leading dimensions flatten without a copy: pages and places in them
            ([N, S, Hkv, D]), or sequences and positions ([slots, Lmax, Hkv, D]). Of k's dtype.
        slots: [T] int64, distinct where not negative.
    """
    if use_triton(k):
        from accel.kernels.kv_write_triton import kv_write_triton as write
    else:
        write = kv_write_reference
    write(k, v, rows_of(keys), rows_of(values), slots)


def rows_of(cache: torch.Tensor) -> torch.Tensor:
    """[..., Hkv, D] as [rows, Hkv, D]; never a copy (torch's error says so where that cannot be)."""
    return cache.view(-1, *cache.shape[-2:])


def kv_write_reference(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """In plain torch, for any device, over flattened keys and values [rows, Hkv, D]. On a GPU it waits for slots."""
    kept = slots >= 0
    if not kept.all():
        k, v, slots = k[kept], v[kept], slots[kept]
    keys[slots] = k
    values[slots] = v
