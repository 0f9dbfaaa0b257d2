"""The judge: a classifier trained on real renders, and the check of a background's colours."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from models.training.checkpoints import Checkpoints
from models.training.distributed import Clock, Ranks
from models.training.flat import FlatOptimizer
from models.training.meter import Meter
from models.training.networks import frozen
from models.training.scenes import LAYOUTS, PAIR, SINGLE, Scenes, Stage
from models.training.settings import Preset

_WARM_UP = 100
_CORNER = 1 / 40  # side of the corner patches, as a share of the picture's


def build_classifier(classes: int) -> nn.Module:
    """ResNet-18 with group normalisation (He et al. 2016; Wu & He 2018)."""
    net: nn.Module = resnet18(num_classes=classes, norm_layer=lambda channels: nn.GroupNorm(16, channels))
    return net


def _logits(net: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    dtype = next(net.parameters()).dtype
    logits: torch.Tensor = net(pictures.to(dtype).contiguous(memory_format=torch.channels_last)).float()
    return logits


def _roughened(pictures: torch.Tensor) -> torch.Tensor:
    """Blur some and add noise, so that the judge does not live on details that no VAE keeps."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    coin = torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    strength = 0.08 * torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    return torch.where(coin < 0.35, blurred, pictures) + strength * torch.randn_like(pictures)


def train_judge(preset: Preset, stage: Stage, ranks: Ranks, checkpoints: Checkpoints, seconds: float) -> "Judge":
    """Train for `seconds`, or load the finished judge."""
    done = checkpoints.finished("judge")
    weights = _optimise(preset, stage, ranks, checkpoints, seconds) if done is None else done["weights"]
    net = build_classifier(len(stage.concepts))
    net.load_state_dict(weights)
    return Judge(frozen(net, ranks.device, ranks.dtype), stage)


def _optimise(
    preset: Preset, stage: Stage, ranks: Ranks, checkpoints: Checkpoints, seconds: float
) -> dict[str, torch.Tensor]:
    """The training loop; the averaged weights, which the finished checkpoint holds."""
    torch.manual_seed(preset.seed + 3)
    net = build_classifier(len(stage.concepts)).to(ranks.device)
    optimizer = FlatOptimizer(net, ranks, decay=0.02, average=0.99)
    clock = Clock(ranks, checkpoints.resume("judge", optimizer))
    torch.manual_seed(preset.seed + 4000 + 17 * optimizer.iterations + ranks.rank)
    batch = ranks.share(preset.judge_batch)
    meter = Meter(clock, batch * ranks.size, window=50)
    while meter.elapsed < seconds:
        pictures, concepts = stage.close_ups(batch)
        logits = _logits(net, _roughened(pictures))
        loss = F.cross_entropy(logits, concepts, label_smoothing=0.05)
        loss.backward()  # type: ignore[no-untyped-call]
        rate = preset.judge_rate * min(1.0, (optimizer.iterations + 1) / _WARM_UP)
        optimizer.step(rate * max(0.01, 1 - meter.elapsed / seconds))
        hits = (logits.argmax(1) == concepts).float().mean()
        meter.step(torch.stack([loss.detach(), hits]))
        checkpoints.keep("judge", optimizer, clock, meter.done)
        if meter.due(preset.log_every, (1, 20)):
            mean_loss, accuracy = meter.means()
            ranks.log(
                f"judge {optimizer.iterations} loss {mean_loss:.3f} accuracy {accuracy:.4f} "
                f"{meter.speed:.0f} pictures/s"
            )
    averaged = build_classifier(len(stage.concepts)).to(ranks.device)
    optimizer.copy_to(averaged, optimizer.ema)
    weights = averaged.state_dict()
    checkpoints.save("judge", {"weights": weights}, finished=True)
    return weights


class Judge:
    """Says whether each picture shows what its scene says."""

    def __init__(self, net: nn.Module, stage: Stage) -> None:
        self._net = net
        self._stage = stage

    @torch.no_grad()
    def classify(self, pictures: torch.Tensor) -> torch.Tensor:
        """Concepts [B] of pictures of half the side."""
        return torch.cat([_logits(self._net, part).argmax(1) for part in pictures.split(256)])

    def concepts_right(self, pictures: torch.Tensor, scenes: Scenes) -> torch.Tensor:
        """Bool [B]: every object is the right one in the right place. All scenes are of one kind."""
        kind = int(scenes.kind[0])
        half = pictures.shape[-1] // 2
        if kind == SINGLE:
            return self.classify(F.avg_pool2d(pictures, 2)) == scenes.first
        right = torch.ones(len(pictures), dtype=torch.bool, device=pictures.device)
        for index, (x, y, scale) in enumerate(LAYOUTS[kind]):
            if scale == 0:
                continue
            left, up = (min(half, max(0, round((c + 1) * half - half / 2))) for c in (x, y))
            expected = scenes.second if kind == PAIR and index == 1 else scenes.first
            right &= self.classify(pictures[:, :, up : up + half, left : left + half]) == expected
        return right

    def colours_right(self, pictures: torch.Tensor, scenes: Scenes) -> torch.Tensor:
        """Bool [B]: the nearest named colours of the upper and lower corners are the scene's."""
        size = max(1, round(pictures.shape[-1] * _CORNER))
        right = torch.ones(len(pictures), dtype=torch.bool, device=pictures.device)
        for rows, expected in ((slice(0, size), scenes.top), (slice(-size, None), scenes.bottom)):
            left, far = pictures[:, :, rows, :size], pictures[:, :, rows, -size:]
            mean = (left.mean((2, 3)) + far.mean((2, 3))) / 2
            right &= torch.cdist((mean + 1) / 2, self._stage.colours).argmin(1) == expected
        return right
