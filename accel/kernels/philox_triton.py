"""The counter-based generator of accel.samplers.noise inside Triton kernels: the same words from the same counters."""

# Triton's functions take tensors and pointers that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, k0):
    """Philox-4x32-10 with counter (c0, c1, 0, 0) and key (k0, 0), all uint32."""
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k1 = k0 ^ k0
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3
