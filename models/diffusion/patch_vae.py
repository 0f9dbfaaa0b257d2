"""A VAE decoder whose pictures several ranks decode together, each its rows.

All that its layers exchange is waited for, so that the pictures are those of one rank up to rounding. A large picture's
activations, some KB a pixel, are shared out with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from accel.patch.exchange import Exchange
from accel.patch.mesh import Mesh
from models.diffusion.patch import install
from models.diffusion.vae import LatentDecoder
from models.errors import PatchError


@dataclass(frozen=True, slots=True)
class DecodeCall:
    """What followers are told: the shape (B, C, h, w) of the latents that are broadcast next, in float32."""

    shape: tuple[int, int, int, int]


class PatchDecoder:
    """Implements `Decoder` on the mesh's leader; on the other ranks it follows.

    Args:
        decoder: it stays usable, with the same weights, for pictures that are decoded by one rank.
        tell: sends a call to every follower; None on followers.

    Raises:
        PatchError: the decoder is not a VAE's.
    """

    def __init__(self, decoder: object, mesh: Mesh, tell: Callable[[DecodeCall], None] | None) -> None:
        if not isinstance(decoder, LatentDecoder):
            raise PatchError(f"a {type(decoder).__name__} has no patch plan; patch_degree 1 would work")
        self.scale = decoder.scale
        self._decoder = decoder
        self._mesh = mesh
        self._tell = tell
        self._link = install(decoder.network, mesh.device)
        self._exchange = Exchange(mesh.rows, mesh.device, "full_sync")

    def check(self, rows: int) -> None:
        """Raise PatchError where pictures of so many latent rows cannot be shared out."""
        if rows % self._mesh.degree:
            raise PatchError(f"{rows} latent rows cannot be shared out among {self._mesh.degree} ranks; a multiple can")

    @torch.inference_mode()
    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] float32 -> [B, H, W, 3] uint8; on the leader."""
        assert self._tell is not None, "followers follow"
        batch, channels, height, width = latents.shape
        self.check(height)
        self._tell(DecodeCall((batch, channels, height, width)))
        return self._decode(latents.contiguous())

    @torch.inference_mode()
    def follow(self, call: DecodeCall) -> None:
        """Take part in a call of the leader's."""
        self._decode(torch.empty(call.shape, device=self._mesh.device))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        self._mesh.broadcast(latents)
        self._link.connect(self._exchange)
        self._exchange.begin([], synchronous=True)
        try:
            band = self._decoder(latents[:, :, self._mesh.rows.place.rows(latents.shape[2])])
        finally:
            self._link.disconnect()
        return torch.cat(self._mesh.gather(band).unbind(), dim=1)
