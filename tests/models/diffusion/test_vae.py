"""Decoding: the stock pipelines' pixels, in parts that bound its memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.diffusion import vae
from models.diffusion.folder import read_folder
from models.diffusion.vae import PixelDecoder, load_decoder, to_uint8
from tests import tiny


def test_pixels_round_as_diffusers_rounds() -> None:
    from diffusers.image_processor import VaeImageProcessor

    pictures = torch.linspace(-1.2, 1.2, 3 * 64 * 64).view(1, 3, 64, 64)
    (expected,) = VaeImageProcessor().postprocess(pictures, output_type="pil")
    np.testing.assert_array_equal(to_uint8(pictures)[0].numpy(), np.asarray(expected))


@given(st.integers(0, 255))
def test_every_level_survives(level: int) -> None:
    picture = torch.full((1, 3, 1, 1), level / 127.5 - 1)
    assert PixelDecoder()(picture).tolist() == [[[[level] * 3]]]


@pytest.mark.parametrize("limit", [1, 2 * 64 * 64, 1 << 20])
def test_parts_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    folder = read_folder(tiny.sd(tmp_path / "model"))
    decoder = load_decoder(folder, torch.device("cpu"), torch.float32)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([decoder(latent[None]) for latent in latents]).int()
    sizes: list[int] = []
    decode = decoder._vae.decode

    def counted(part: torch.Tensor, **keywords: bool) -> object:
        sizes.append(len(part))
        return decode(part, **keywords)

    monkeypatch.setattr(decoder._vae, "decode", counted)
    monkeypatch.setitem(vae.MAX_DECODE_PIXELS, "cpu", limit)
    together = decoder(latents)
    assert together.shape == (5, 64, 64, 3)
    assert together.dtype == torch.uint8
    assert (together.int() - alone).abs().max() <= 1
    assert max(sizes) == max(1, min(5, limit // 64**2))
