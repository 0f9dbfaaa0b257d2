"""The scorer's training: a dual encoder on real renders and their captions, whose patches learn what they show.

The contrastive loss is CLIP's (Radford et al. 2021), with a second caption per picture that is wrong in one thing.
The dense losses are on patches; there every object counts the same, whatever its size.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from models.scorer.config import Sizes, Thresholds, Vocabulary
from models.scorer.network import ScorerNetwork
from models.scorer.scorer import Scorer
from models.training.captions import CaptionWriter
from models.training.checkpoints import Checkpoints
from models.training.compiled import Compiled
from models.training.concepts import COLOUR_NAMES, STYLES, TINTS
from models.training.distributed import Clock, Ranks
from models.training.flat import FlatOptimizer
from models.training.grounds import COLOURED, GROUNDS, STRIPES
from models.training.layouts import PLACEMENTS, RELATIONS
from models.training.meter import Meter
from models.training.networks import frozen, millions
from models.training.scenes import Scenes, Stage
from models.training.settings import Preset
from models.training.text import TextTower
from models.training.vae import decode, moments

_IGNORED = -100  # cross_entropy's target for "not to be learned from"
_WEIGHTS = {  # of the losses in the sum
    "contrast": 0.5, "ground patch": 0.5, "concept": 1.0, "tint": 0.5, "density": 0.3, "count": 0.5,
    "style": 0.25, "ground": 0.25, "top": 0.25, "bottom": 0.25, "relation": 0.5,
}  # fmt: skip
_ACCURACIES = ("contrast", "concept", "tint", "count", "style", "ground", "top", "bottom", "relation")
_DECODED = 8  # one picture in so many passes through the VAE
_LATENT_NOISE = 0.1


def sizes_of(preset: Preset, text_width: int) -> Sizes:
    """The scorer's sizes: 16 x 16 patches of the full preset's pictures, 8 x 8 in miniature."""
    if preset.resolution >= 256:
        return Sizes(256, (32, 64, 160), width=256, layers=4, heads=4, embed=256, text_width=text_width)
    return Sizes(preset.resolution, (16, 32), width=64, layers=2, heads=2, embed=32, text_width=text_width)


def vocabulary_of(stage: Stage) -> Vocabulary:
    """The words of a stage; the relation "and" places nothing, so it is not one to be read."""
    names = tuple(concept.name for concept in stage.concepts)
    own = {concept.name: tuple(word for word in concept.colours if word in TINTS) for concept in stage.concepts}
    own = {name: words for name, words in own.items() if words}
    return Vocabulary(names, ("natural", *TINTS), STYLES, GROUNDS, COLOUR_NAMES, RELATIONS[1:], own)


@torch.no_grad()
def sentences(tower: TextTower, ids: torch.Tensor) -> torch.Tensor:
    """Mean states [N, width] over the tokens of ids [N, L], as open_clip's mean pooler computes them."""
    there = ids != tower.pad
    dtype = next(tower.model.parameters()).dtype
    # As a ready mask: transformers reads a plain one back to see whether it is full, which waits for the device.
    mask = torch.zeros(there.shape, dtype=dtype, device=ids.device).masked_fill(~there, torch.finfo(dtype).min)
    states = tower.model(input_ids=ids, attention_mask=mask[:, None, None].expand(-1, 1, ids.shape[1], -1))[0]
    return (states * there[..., None]).sum(1) / there.sum(1, keepdim=True)  # type: ignore[no-any-return]


class Targets(NamedTuple):
    """What the pictures of B scenes show; P patches, groups g of objects (0 and 1).

    cover: [B, 3, P], the share of each patch that shows the ground and each group. density: [B, 2, P], sums to 1 over
    every visible object. concept, tint: [B, 2]. relation, style, ground, top, bottom: [B], -100 where there is none.
    """

    cover: torch.Tensor
    density: torch.Tensor
    concept: torch.Tensor
    tint: torch.Tensor
    relation: torch.Tensor
    style: torch.Tensor
    ground: torch.Tensor
    top: torch.Tensor
    bottom: torch.Tensor

    @classmethod
    def of(cls, scenes: Scenes, owners: torch.Tensor) -> "Targets":
        """`owners` [B, 6, cells, cells] as `Stage.compose_with_owners` gives them."""
        owners = owners.flatten(2)
        objects = owners[:, 1:]
        unit = objects / objects.sum(2, keepdim=True).clamp(min=1e-6)
        membership = F.one_hot(scenes.group, 2).to(owners.dtype).transpose(1, 2)  # [B, 2, 5]
        placed = (scenes.relation > 0) & (scenes.count[:, 1] > 0)
        coloured, striped = scenes.ground < COLOURED, scenes.ground == STRIPES
        # Stripes of two colours look the same either way round.
        top = torch.where(striped, scenes.top.minimum(scenes.bottom), scenes.top)
        bottom = torch.where(striped, scenes.top.maximum(scenes.bottom), scenes.bottom)
        return cls(
            cover=torch.cat([owners[:, :1], membership @ objects], 1),
            density=membership @ unit,
            concept=scenes.concept,
            tint=scenes.tint,
            relation=torch.where(placed, scenes.relation - 1, _IGNORED),
            style=scenes.style,
            ground=scenes.ground,
            top=torch.where(coloured, top, _IGNORED),
            bottom=torch.where(coloured, bottom, _IGNORED),
        )


def roughened(pictures: torch.Tensor) -> torch.Tensor:
    """Shift colours, soften some pictures, add noise: the scorer must not live on details that no VAE keeps."""
    shape, device = (len(pictures), 1, 1, 1), pictures.device
    gain = 1 + 0.05 * (2 * torch.rand(len(pictures), 3, 1, 1, device=device) - 1)
    pictures = pictures * gain + 0.04 * (2 * torch.rand(shape, device=device) - 1)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    small = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear", align_corners=False)
    coin = torch.rand(shape, device=device)
    pictures = torch.where(coin < 0.25, soft, torch.where(coin < 0.4, small, pictures))
    return pictures + 0.08 * torch.rand(shape, device=device) * torch.randn_like(pictures)


class ScorerLoss(nn.Module):
    """The weighted sum of all losses, and each of them with the accuracies."""

    def __init__(self, network: ScorerNetwork, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(
        self,
        pictures: torch.Tensor,
        captions: torch.Tensor,
        wrong: torch.Tensor,
        same: torch.Tensor,
        names: torch.Tensor,
        *of_scenes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, [loss, each loss, each accuracy]).

        pictures [B, 3, H, H]; captions and wrong captions [B, text width], the text tower's; same: bool [B, 2B], other
        captions than a picture's own that say the same; names [N, text width];
        of_scenes: the fields of Targets.
        """
        targets = Targets(*of_scenes)
        with torch.no_grad():
            pictures = roughened(pictures).to(self.dtype).contiguous(memory_format=torch.channels_last)
        network = self.network
        tokens = network(pictures)
        losses, hits = self._contrast(tokens.pooled, captions, wrong, same)
        concept, concept_hits = self._concepts(network.concept_logits(tokens.patches, network.classes(names)), targets)
        tint, tint_hits = _dense(network.tint(tokens.patches), targets.tint, targets.density)
        density, count_hits = self._densities(tokens.patches, targets)
        losses |= concept | {"tint": tint} | density
        hits |= concept_hits | {"tint": tint_hits} | count_hits
        logits = {**network.whole_logits(tokens)._asdict()}
        logits["relation"] = network.relation_logits(tokens.patches, targets.cover[:, 1:])
        for name, values in logits.items():
            losses[name], hits[name] = _classified(values, getattr(targets, name))
        total = torch.stack([weight * losses[name] for name, weight in _WEIGHTS.items()]).sum()
        told = [total, *(losses[name] for name in _WEIGHTS), *(hits[name] for name in _ACCURACIES)]
        return total, torch.stack([value.detach().float() for value in told])

    def _contrast(
        self, pooled: torch.Tensor, captions: torch.Tensor, wrong: torch.Tensor, same: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        count = len(pooled)
        pictures, texts = F.normalize(pooled.float(), dim=-1), self.network.embed_text(torch.cat([captions, wrong]))
        logits = self.network.scale.float().clamp(max=4.6).exp() * pictures @ texts.T
        logits = logits.masked_fill(same, -1e4)
        own = torch.arange(count, device=pooled.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :count].T, own)) / 2
        return {"contrast": loss}, {"contrast": (logits.argmax(1) == own).float().mean()}

    @staticmethod
    def _concepts(logits: torch.Tensor, targets: Targets) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Cross-entropies of the patches' ground and objects; the accuracy leaves the ground aside."""
        cover = targets.cover[:, 0]
        normal = logits.float().logsumexp(-1)
        ground = ((normal - logits[..., 0].float()) * cover).sum() / cover.sum().clamp(min=1)
        objects, hits = _dense(logits, targets.concept + 1, targets.density, first=1)
        return {"ground patch": ground, "concept": objects}, {"concept": hits}

    def _densities(
        self, patches: torch.Tensor, targets: Targets
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Poisson divergence of the patches' densities, and the groups' sums."""
        density, wanted = self.network.densities(patches), targets.density.sum(1)
        divergence = wanted * ((wanted + 1e-6).log() - density.log()) - wanted + density
        share = targets.cover[:, 1:] / targets.cover[:, 1:].sum(1, keepdim=True).clamp(min=1e-4)
        counts, visible = (share * density[:, None]).sum(2), targets.density.sum(2)
        right = (counts.round() == visible.round()).all(1).float().mean()
        return (
            {"density": divergence.sum(1).mean(), "count": F.smooth_l1_loss(counts, visible, beta=0.25)},
            {"count": right},
        )


def _dense(
    logits: torch.Tensor, wanted: torch.Tensor, density: torch.Tensor, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, share of hits among the classes from `first` on), averaged over objects.

    logits [B, P, K]; wanted [B, 2], a class per group; density [B, 2, P].
    """
    total = density.sum().clamp(min=1)
    index = wanted[:, None].expand(-1, logits.shape[1], -1)  # [B, P, 2]
    missing = logits.float().logsumexp(-1, keepdim=True) - logits.gather(2, index).float()
    best = logits[..., first:].argmax(-1) + first
    hits = (best[:, None] == wanted[:, :, None]) * density
    return (missing * density.transpose(1, 2)).sum() / total, hits.sum() / total


def _classified(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, accuracy) of logits [B, K] over the rows that have a class [B]."""
    some = wanted != _IGNORED
    number = some.sum().clamp(min=1)
    loss = F.cross_entropy(logits, wanted, ignore_index=_IGNORED, reduction="sum") / number
    return loss, ((logits.argmax(1) == wanted) & some).sum() / number


class Alteration(IntEnum):
    """One thing that a caption says, told wrongly: of the first group of objects, or of the scene."""

    OBJECT = 0
    COUNT = 1
    COLOUR = 2
    EXCHANGE = 3  # of the two groups
    STYLE = 4
    GROUND = 5  # its colours


def alter(scenes: Scenes, kind: torch.Tensor, concepts: int) -> tuple[Scenes, torch.Tensor]:
    """Scenes told differently, each in one thing, an Alteration `kind` [B]; placements are left as they are.

    Also bool [B]: the scene says that thing, so it was altered.
    """
    count, device = len(scenes), scenes.concept.device

    def other(value: torch.Tensor, total: int) -> torch.Tensor:
        """Another one of `total` values."""
        return (value + torch.randint(1, total, (count,), device=device)) % total

    always = torch.ones(count, dtype=torch.bool, device=device)
    two, coloured = scenes.count[:, 1] > 0, scenes.named & (scenes.ground < COLOURED)
    said = torch.stack([always, always, always, two, scenes.styled, coloured]).gather(0, kind[None])[0]
    object_, counted, tinted, exchanged, restyled, recoloured = (said & (kind == one) for one in Alteration)
    concept, number, tint, size = (
        torch.where(exchanged[:, None], value.flip(1), value)
        for value in (scenes.concept, scenes.count, scenes.tint, scenes.size)
    )
    step = torch.randint(1, len(COLOUR_NAMES), (count,), device=device) * recoloured
    changed = replace(
        scenes,
        concept=_with_first(concept, torch.where(object_, other(concept[:, 0], concepts), concept[:, 0])),
        count=_with_first(number, torch.where(counted, other(number[:, 0] - 1, PLACEMENTS) + 1, number[:, 0])),
        tint=_with_first(tint, torch.where(tinted, other(tint[:, 0] - 1, len(TINTS)) + 1, tint[:, 0])),
        size=size,
        style=torch.where(restyled, other(scenes.style, len(STYLES)), scenes.style),
        top=(scenes.top + step) % len(COLOUR_NAMES),
        bottom=(scenes.bottom + step) % len(COLOUR_NAMES),
    )
    return changed, said


def altered(scenes: Scenes, concepts: int) -> Scenes:
    """Scenes told wrongly in something that captions say; for training, objects twice as often as each of the rest."""
    kind = (torch.randint(-1, len(Alteration), (len(scenes),), device=scenes.concept.device)).clamp(min=0)
    _, said = alter(scenes, kind, concepts)
    return alter(scenes, torch.where(said, kind, Alteration.OBJECT), concepts)[0]


def _with_first(pairs: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    return torch.stack([first, pairs[:, 1]], 1)


class ScorerBatches:
    """The arguments of `ScorerLoss.forward`, drawn from a stage."""

    def __init__(
        self, stage: Stage, writer: CaptionWriter, tower: TextTower, sizes: Sizes, batch: int, vae: AutoencoderKL | None
    ) -> None:
        self._stage, self._writer, self._tower, self._sizes = stage, writer, tower, sizes
        self._batch, self._vae = batch, vae
        self.names = sentences(tower, tower.tokens([concept.name for concept in stage.concepts]))

    def draw(self) -> tuple[torch.Tensor, ...]:
        """One batch of random training scenes."""
        scenes = self._stage.sample(self._batch)
        pictures, owners = self._stage.compose_with_owners(scenes, self._sizes.side, self._sizes.cells)
        if self._vae is not None:
            pictures = self._decoded(pictures, self._vae)
        ids = self._writer.write(Scenes.cat([scenes, altered(scenes, len(self._stage.concepts))]))
        captions, wrong = sentences(self._tower, ids).chunk(2)
        same = (ids[: self._batch, None] == ids[None]).all(2)
        same.fill_diagonal_(False)
        return pictures, captions, wrong, same, self.names, *Targets.of(scenes, owners)

    @torch.no_grad()
    def _decoded(self, pictures: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
        """Some pictures as the VAE gives them back."""
        rows = torch.randperm(self._batch, device=pictures.device)[: max(1, self._batch // _DECODED)]
        latents, _ = moments(vae, pictures[rows])
        again = decode(vae, latents + _LATENT_NOISE * torch.randn_like(latents)).clamp(-1, 1)
        return pictures.index_copy(0, rows, again.to(pictures.dtype))


@torch.no_grad()
def spread_projection(network: ScorerNetwork, vectors: torch.Tensor) -> None:
    """Begin with a projection that partly whitens the text tower's vectors [n, text width]: they lie close together."""
    vectors = vectors.float()
    values, axes = torch.linalg.eigh(vectors.T @ vectors / len(vectors))
    embed = network.projection.out_features
    kept = values[-embed:].clamp(min=1e-3 * float(values[-1]))
    network.projection.weight[: len(kept)] = (axes[:, -embed:] * kept**-0.25).T


def train_scorer(
    preset: Preset,
    stage: Stage,
    writer: CaptionWriter,
    tower: TextTower,
    ranks: Ranks,
    checkpoints: Checkpoints,
    seconds: float,
    vae: AutoencoderKL | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train for `seconds`, or load the finished scorer: its averaged float32 weights, and its figures.

    `vae`: frozen, in the run's arithmetic; some pictures pass through it.
    """
    done = checkpoints.finished("scorer")
    if done is not None:
        return done["weights"], done["figures"]
    sizes, vocabulary = sizes_of(preset, tower.width), vocabulary_of(stage)
    batch = ranks.share(preset.scorer_batch)
    batches = ScorerBatches(stage, writer, tower, sizes, batch, vae)
    torch.manual_seed(preset.seed + 9)
    network = ScorerNetwork(sizes, vocabulary).to(ranks.device)
    spread_projection(network, torch.cat([batches.names, sentences(tower, writer.write(stage.sample(2048)))]))
    ranks.log(f"scorer: {millions(network):.2f} M parameters")
    optimizer = FlatOptimizer(network, ranks, decay=0.02, average=0.998)
    step = Compiled(ScorerLoss(network, ranks.dtype), "scorer", ranks, backward=True, clear=optimizer.clear)
    clock = Clock(ranks, checkpoints.resume("scorer", optimizer))
    torch.manual_seed(preset.seed + 6000 + 17 * optimizer.iterations + ranks.rank)
    meter = Meter(clock, batch * ranks.size, window=50)
    while meter.elapsed < seconds:
        rate = preset.scorer_rate * min(1.0, (optimizer.iterations + 1) / preset.warm_up)
        rate *= max(0.01, 0.5 * (1 + math.cos(math.pi * min(1.0, meter.elapsed / seconds))))
        _, told = step(*batches.draw())
        norm = optimizer.step(rate)
        meter.step(told)
        checkpoints.keep("scorer", optimizer, clock, meter.done)
        if meter.due(preset.log_every, (1, 20, 100)):
            _log(ranks, meter, optimizer.iterations, float(norm), rate)
    averaged = ScorerNetwork(sizes, vocabulary).to(ranks.device)
    optimizer.copy_to(averaged, optimizer.ema)
    weights = averaged.state_dict()
    figures = meter.figures(optimizer.iterations, network)
    checkpoints.save("scorer", {"weights": weights, "figures": figures}, finished=True)
    return weights, figures


def _log(ranks: Ranks, meter: Meter, iteration: int, norm: float, rate: float) -> None:
    total, *rest = meter.means()
    losses = " ".join(f"{name} {value:.3f}" for name, value in zip(_WEIGHTS, rest, strict=False))
    hits = " ".join(f"{name} {value:.3f}" for name, value in zip(_ACCURACIES, rest[len(_WEIGHTS) :], strict=True))
    ranks.log(
        f"scorer {iteration} loss {total:.3f} ({losses}) right ({hits}) norm {norm:.2f} rate {rate:.1e} "
        f"{meter.elapsed:.0f} s {meter.speed:.0f} pictures/s"
    )


def make_scorer(
    preset: Preset,
    weights: Mapping[str, torch.Tensor],
    stage: Stage,
    tower: TextTower,
    thresholds: Thresholds | None = None,
) -> Scorer:
    """The scorer of trained weights, in float32 on the stage's device."""
    sizes, vocabulary = sizes_of(preset, tower.width), vocabulary_of(stage)
    network = ScorerNetwork(sizes, vocabulary)
    network.load_state_dict(weights)
    encoder = copy.deepcopy(tower.model).float()
    network = frozen(network, stage.device, torch.float32)
    return Scorer(network, encoder, tower.tokens, sizes, vocabulary, thresholds or Thresholds())
