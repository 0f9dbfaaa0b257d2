"""The trained part of the scorer: open_clip's image tower with a convolutional stem, and the heads that read it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import nn

from models.scorer.config import STEM_GROUP, Sizes, Vocabulary

_GEOMETRY = 5  # an object's centre, its spread across and down, the root of its area
_QUIET = -5.0  # first log-density of a patch: a few objects over a few hundred patches


class Tokens(NamedTuple):
    """What the image tower makes of pictures: pooled [B, E], patches [B, P, W], row by row."""

    pooled: torch.Tensor
    patches: torch.Tensor

    @property
    def features(self) -> torch.Tensor:
        """Mean over the patches [B, W]."""
        return self.patches.mean(1)


class Whole(NamedTuple):
    """Logits of a picture as a whole, each [B, words]."""

    style: torch.Tensor
    ground: torch.Tensor
    top: torch.Tensor
    bottom: torch.Tensor


class Residual(nn.Module):
    """x + conv(gelu(norm(conv(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *_convolution(channels, channels, stride=1), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return conv, nn.GroupNorm(outputs // STEM_GROUP, outputs), nn.GELU()


def build_stem(sizes: Sizes) -> nn.Sequential:
    """A patch embedding of stacked 3x3 convolutions (Xiao et al. 2021), with residuals from the second on."""
    layers: list[nn.Module] = []
    before = 3
    for index, channels in enumerate(sizes.stem):
        layers.extend(_convolution(before, channels, stride=2))
        if index > 0:
            layers.append(Residual(channels))
        before = channels
    layers.append(nn.Conv2d(before, sizes.width, 3, stride=2, padding=1))
    return nn.Sequential(*layers)


class ScorerNetwork(nn.Module):
    """Image tower, text projection and heads; everything that is trained. N concepts, P patches, E the shared width."""

    centres: torch.Tensor  # [P, 2]: x and y of the patches, in half pictures

    def __init__(self, sizes: Sizes, vocabulary: Vocabulary) -> None:
        super().__init__()
        width, embed = sizes.width, sizes.embed
        self.visual = VisionTransformer(
            image_size=sizes.side,
            patch_size=sizes.patch,
            width=width,
            layers=sizes.layers,
            heads=sizes.heads,
            mlp_ratio=4.0,
            output_dim=embed,
            output_tokens=True,
        )
        self.visual.conv1 = build_stem(sizes)
        self.projection = nn.Linear(sizes.text_width, embed, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.concept = nn.Linear(width, embed)
        self.concept_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.offsets = nn.Parameter(torch.zeros(len(vocabulary.names), embed))
        self.ground = nn.Linear(width, 1)
        self.tint = nn.Linear(width, len(vocabulary.tints))
        self.density = nn.Linear(width, 1)
        nn.init.constant_(self.density.bias, _QUIET)
        self._words = [len(vocabulary.styles), len(vocabulary.grounds), *2 * [len(vocabulary.colours)]]
        self.whole = nn.Linear(embed + width, sum(self._words))
        self.relation = nn.Sequential(
            nn.Linear(2 * (width + _GEOMETRY), width), nn.GELU(), nn.Linear(width, len(vocabulary.relations))
        )
        steps = (torch.arange(sizes.cells) + 0.5) * (2 / sizes.cells) - 1
        centres = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(-1, 2)
        self.register_buffer("centres", centres, persistent=False)

    def forward(self, pictures: torch.Tensor) -> Tokens:
        """Tokens of pictures [B, 3, side, side] in [-1, 1]."""
        return Tokens(*self.visual(pictures))

    def embed_text(self, sentences: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, E] of the text tower's pooled output [B, text width], float32."""
        return F.normalize(self.projection(sentences).float(), dim=-1)

    def classes(self, names: torch.Tensor) -> torch.Tensor:
        """Unit class vectors [N, E] from the names' pooled text [N, text width]: their embeddings, adjusted."""
        return F.normalize(self.embed_text(names) + self.offsets.float(), dim=-1)

    def concept_logits(self, patches: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Logits [B, P, 1 + N] of what each patch shows: the ground, or a concept (class vectors [N, E])."""
        seen = F.normalize(self.concept(patches).float(), dim=-1) * self.concept_scale.float().clamp(max=4.6).exp()
        against = seen.to(patches.dtype) @ classes.to(patches.dtype).T
        return torch.cat([self.ground(patches), against], -1)

    def densities(self, patches: torch.Tensor) -> torch.Tensor:
        """How much of an object each patch holds [B, P], float32; sums to 1 over an object."""
        return self.density(patches)[..., 0].float().clamp(-16, 2).exp()  # type: ignore[no-any-return]

    def whole_logits(self, tokens: Tokens) -> Whole:
        """Logits of style, ground, and upper and lower colour."""
        logits = self.whole(torch.cat([tokens.pooled, tokens.features], -1)).float()
        return Whole(*logits.split(self._words, -1))

    def relation_logits(self, patches: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
        """Logits [B, relations] of how the first object or group stands to the second.

        `cover` [B, 2, P]: how much of each patch belongs to each of the two.
        """
        area = cover.sum(-1, keepdim=True)
        share = cover / area.clamp(min=1e-4)
        centre = share @ self.centres.to(share.dtype)  # [B, 2, 2]
        off = (self.centres.to(share.dtype) - centre[:, :, None]).square()  # [B, 2, P, 2]
        spread = ((share[..., None] * off).sum(2) + 1e-6).sqrt()
        geometry = torch.cat([centre, spread, (area / cover.shape[-1] + 1e-6).sqrt()], -1)
        seen = torch.cat([share.to(patches.dtype) @ patches, geometry.to(patches.dtype)], -1)
        return self.relation(seen.flatten(1)).float()  # type: ignore[no-any-return]
