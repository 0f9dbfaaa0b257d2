"""Prompts and pictures to embeddings, and pictures to what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from torch import nn

from models.scorer.config import Sizes, Thresholds, Vocabulary
from models.scorer.judging import Verdicts, measure, verdicts
from models.scorer.network import ScorerNetwork

_BATCH = 32


class Reading(NamedTuple):
    """What N pictures show, each field with N first; P patches, row by row.

    embedding: [N, E], unit norm, comparable with a prompt's. features: [N, W], for Fréchet distances.
    concept: [N, P], the likeliest concept of what each patch holds besides ground. cover: [N, P], how much of the patch
    is not ground. density: [N, P], in objects. tint: [N, P, T], shares. patches: [N, P, W], float16.
    style, ground, top, bottom: [N], indices of words.
    """

    embedding: torch.Tensor
    features: torch.Tensor
    concept: torch.Tensor
    cover: torch.Tensor
    density: torch.Tensor
    tint: torch.Tensor
    patches: torch.Tensor
    style: torch.Tensor
    ground: torch.Tensor
    top: torch.Tensor
    bottom: torch.Tensor

    @classmethod
    def cat(cls, readings: Sequence[Self]) -> Self:
        """Several readings as one."""
        return cls(*map(torch.cat, zip(*readings, strict=True)))


def text_tower(encoder: nn.Module, projection: nn.Linear) -> HFTextEncoder:
    """open_clip's adapter around an encoder that is loaded already: the mean of its states, then `projection`."""
    with torch.device("meta"):  # the adapter builds a random encoder, which is replaced
        tower = HFTextEncoder(
            "", projection.out_features, config=encoder.config, pooler_type="mean_pooler", proj_type="linear"
        )
    tower.transformer, tower.proj = encoder, projection
    return tower


class Scorer:
    """A trained scorer. Everything it returns is on its device; float32 unless said otherwise."""

    def __init__(
        self,
        network: ScorerNetwork,
        encoder: nn.Module,
        tokenize: Callable[[Sequence[str]], torch.Tensor],
        sizes: Sizes,
        vocabulary: Vocabulary,
        thresholds: Thresholds,
    ) -> None:
        """`network` and `encoder` (BERT-like, from transformers) on one device, in eval mode; `tokenize` pads."""
        self.sizes, self.vocabulary, self.thresholds = sizes, vocabulary, thresholds
        self.network = network
        self.device = next(network.parameters()).device
        self._text = text_tower(encoder, network.projection).eval()
        self._tokenize = tokenize
        with torch.inference_mode():
            pooled = torch.cat([self._pooled(part) for part in _parts(vocabulary.names)])
            self._names = network.embed_text(pooled)
            self._classes = network.classes(pooled)

    def _pooled(self, prompts: Sequence[str]) -> torch.Tensor:
        """The text tower's mean states before the projection [n, text width]."""
        ids = self._tokenize(prompts).to(self.device)
        mask = (ids != self._text.config.pad_token_id).long()
        pooled: torch.Tensor = self._text.pooler(self._text.transformer(input_ids=ids, attention_mask=mask), mask)
        return pooled

    @torch.inference_mode()
    def embed_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [N, E]; a prompt is cut where the tokenizer's length ends."""
        parts = [
            F.normalize(self._text(self._tokenize(part).to(self.device)).float(), dim=-1) for part in _parts(prompts)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.sizes.embed, device=self.device)

    @torch.inference_mode()
    def read(self, pictures: torch.Tensor) -> Reading:
        """Read pictures [N, 3, H, H] in [-1, 1] of any size; N at least 1."""
        return Reading.cat([self._read(part) for part in pictures.to(self.device, torch.float32).split(_BATCH)])

    def _read(self, pictures: torch.Tensor) -> Reading:
        side, network = self.sizes.side, self.network
        if pictures.shape[-2:] != (side, side):
            pictures = F.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        tokens = network(pictures.contiguous(memory_format=torch.channels_last))
        logits = network.concept_logits(tokens.patches, self._classes)
        return Reading(
            embedding=F.normalize(tokens.pooled, dim=-1),
            features=tokens.features,
            concept=logits[..., 1:].argmax(-1),
            cover=1 - logits.softmax(-1)[..., 0],
            density=network.densities(tokens.patches),
            tint=network.tint(tokens.patches).softmax(-1),
            patches=tokens.patches.half(),
            **{field: logits.argmax(-1) for field, logits in network.whole_logits(tokens)._asdict().items()},
        )

    def concepts(self, reading: Reading, k: int) -> torch.Tensor:
        """Indices [N, k] of the concepts whose names' embeddings are nearest to the pictures', the nearest first."""
        return (reading.embedding @ self._names.T).topk(k, dim=1).indices

    @torch.inference_mode()
    def judge(self, reading: Reading, records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Whether each picture shows what its record says.

        Returns a list per metric, with an entry per record: "objects", "colours", "relation", "count", "style",
        "background" are true, false, or None where the record does not say; "all" is true if none of them is false;
        "score" is the cosine with the prompt. What each asks is written at `judging.METRICS`.

        Raises ModelError if a record is malformed or names what this scorer does not know.
        """
        found = self.verdicts(reading, records, self.thresholds)
        prompts = self.embed_text([record["prompt"] for record in records])
        return {**found, "score": (reading.embedding * prompts).sum(1).tolist()}

    @torch.inference_mode()
    def verdicts(self, reading: Reading, records: Sequence[Mapping[str, Any]], thresholds: Thresholds) -> Verdicts:
        """`judge` without the score, under other thresholds."""
        return verdicts(measure(self.network, reading, records, self.vocabulary), records, self.vocabulary, thresholds)


def _parts(prompts: Sequence[str]) -> list[Sequence[str]]:
    return [prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH)]
