"""What names a cached latent: the key space that it may be found in, and the header of its entry."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class KeySpace:
    """Everything that must be equal before one request may start from another's latent.

    The sampler and its steps are not part of it: a latent is stored with its noise level, which any plan can enter at.
    """

    tenant: str
    model: str  # "name@revision"
    family: str  # kind of noise schedule that the model was trained with
    loras: tuple[tuple[str, float], ...]  # (digest of the file, scale), sorted by whoever builds the key
    shape: tuple[int, int, int]  # (C, h, w) of a latent
    guidance: float  # see `guidance_bucket`
    negative_prompt: str

    @property
    def digest(self) -> bytes:
        """16 bytes, the same in every process and on every machine."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).digest()

    def to_json(self) -> str:
        """Canonical: equal spaces give equal text."""
        fields = {
            "tenant": self.tenant,
            "model": self.model,
            "family": self.family,
            "loras": [[name, float(weight)] for name, weight in self.loras],
            "shape": [int(size) for size in self.shape],
            "guidance": float(self.guidance),
            "negative_prompt": self.negative_prompt,
        }
        return json.dumps(fields, separators=(",", ":"), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> KeySpace:
        """Raises KeyError, TypeError or ValueError for text that `to_json` did not write."""
        fields: dict[str, Any] = json.loads(text)
        channels, height, width = fields["shape"]
        return cls(
            tenant=fields["tenant"],
            model=fields["model"],
            family=fields["family"],
            loras=tuple((name, float(weight)) for name, weight in fields["loras"]),
            shape=(channels, height, width),
            guidance=float(fields["guidance"]),
            negative_prompt=fields["negative_prompt"],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """One entry: what a prompt left behind, apart from the latents themselves. Compared by identity."""

    id: int  # 63 random bits, see `random_id`
    space: KeySpace
    prompt: str
    embedding: NDArray[np.float32]  # [D], unit norm
    created: float  # seconds since the epoch
    levels: tuple[float, ...]  # alphas of the stored latents, ascending: noisiest first
    sizes: tuple[int, ...]  # bytes that each level takes in the store


def random_id() -> int:
    """Ids are not counted up, so that servers need not agree on them and none tells how many there are."""
    return secrets.randbits(63)


def guidance_bucket(guidance: float) -> float:
    """The guidance scale rounded to half a unit: requests that close share latents."""
    return round(guidance * 2) / 2
