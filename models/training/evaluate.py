"""Evaluation on prompts whose (concept, style, colour) was never drawn in training."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from models.training.concepts import COLOUR_NAMES, WHITE
from models.training.distributed import Ranks
from models.training.judge import Judge
from models.training.sampling import FixedBatch, sample_ddim, sample_lcm
from models.training.scenes import KINDS, PAIR, SINGLE, Scenes, Stage, describe
from models.training.settings import Preset
from models.training.text import TextTower
from models.training.vae import decode, moments

DDIM_GUIDANCE = (3.0,)
LCM_GUIDANCE = (2.0,)
LCM_STEPS = (1, 2, 4, 8)

Sampler = Callable[[torch.Tensor], torch.Tensor]


class Models:
    """The trained networks ready to draw: text states in, pictures out."""

    def __init__(
        self,
        preset: Preset,
        ranks: Ranks,
        tower: TextTower,
        vae: AutoencoderKL,
        teacher: FixedBatch,
        student: FixedBatch,
    ) -> None:
        self.ranks, self.tower, self.vae, self.teacher, self.student = ranks, tower, vae, teacher, student
        self._preset = preset
        self._null = tower.encode_prompts([""])

    def ddim(self, guidance: float, seed: int) -> Sampler:
        def draw(states: torch.Tensor) -> torch.Tensor:
            side = self._preset.latent
            return self.pictures(
                sample_ddim(self.teacher, states, self._null, side, self.ranks, guidance=guidance, seed=seed)
            )

        return draw

    def lcm(self, steps: int, guidance: float, seed: int) -> Sampler:
        def draw(states: torch.Tensor) -> torch.Tensor:
            latents = sample_lcm(
                self.student, states, self._preset.latent, self.ranks, guidance=guidance,
                guidance_width=self._preset.guidance_width, seed=seed, steps=steps,
            )  # fmt: skip
            return self.pictures(latents)

        return draw

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Decoded and clamped, [B, 3, H, H]."""
        return torch.cat([decode(self.vae, part).clamp(-1, 1) for part in latents.split(64)])

    @torch.no_grad()
    def reconstruct(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat([decode(self.vae, moments(self.vae, part)[0]).clamp(-1, 1) for part in pictures.split(64)])


def held_out_scenes(stage: Stage, kind: int, count: int, seed: int, *, gradient: bool = False) -> Scenes:
    """Scenes of one kind built on held-out triples; style and background are named."""
    rng = np.random.default_rng(seed)
    triples = np.argwhere(stage.held_out.cpu().numpy())
    if not len(triples):
        raise ValueError("no triple is held out: the concept table is too small")
    chosen = triples[rng.permutation(len(triples))]
    chosen = np.resize(chosen, (count, 3)) if len(chosen) < count else chosen[:count]
    first, style, top = (torch.from_numpy(column.copy()).to(stage.device) for column in chosen.T)
    second = torch.from_numpy(rng.integers(1, len(stage.concepts), count)).to(stage.device)
    second = (first + second) % len(stage.concepts) if kind == PAIR else first
    bottom = top
    if gradient:
        bottom = (top + torch.from_numpy(rng.integers(1, len(COLOUR_NAMES), count)).to(stage.device)) % len(
            COLOUR_NAMES
        )
    yes, no = (torch.full((count,), flag, device=stage.device) for flag in (True, False))
    return Scenes(torch.full((count,), kind, device=stage.device), first, second, style, top, bottom, yes, yes, no)


def word_scenes(stage: Stage, words: list[tuple[int, str]], seed: int) -> tuple[Scenes, list[str]]:
    """One object on a plain background for each (concept, word), style unnamed; the scenes and the words."""
    rng = np.random.default_rng(seed)
    count = len(words)
    first = torch.tensor([index for index, _ in words], device=stage.device)
    top = torch.from_numpy(rng.integers(0, WHITE, count)).to(stage.device)
    yes, no = (torch.full((count,), flag, device=stage.device) for flag in (True, False))
    zero = torch.zeros_like(first)
    return Scenes(zero + SINGLE, first, first, zero, top, top, no, yes, no), [word for _, word in words]


class Evaluation:
    """Runs samplers over sets of scenes and collects percentages."""

    def __init__(self, stage: Stage, judge: Judge, models: Models) -> None:
        self._stage, self._judge, self._models = stage, judge, models
        self._ranks = models.ranks
        self.results: dict[str, dict[str, dict[str, float]]] = {}

    def score(self, sampler: str, group: str, pictures: torch.Tensor, scenes: Scenes) -> None:
        """Record how many of this rank's pictures are right, summed over ranks."""
        concept = self._judge.concepts_right(pictures, scenes)
        colour = self._judge.colours_right(pictures, scenes)
        counts = torch.stack([concept.sum(), colour.sum(), (concept & colour).sum()]).float()
        counts = torch.cat([counts, torch.tensor([float(len(scenes))], device=counts.device)])
        right, coloured, both, total = self._ranks.sum(counts).tolist()
        row = {"concept": 100 * right / total, "colour": 100 * coloured / total, "both": 100 * both / total, "n": total}
        self.results.setdefault(sampler, {})[group] = row
        self._ranks.log(
            f"eval {sampler:16s} {group:14s} concept {row['concept']:5.1f} colour {row['colour']:5.1f} "
            f"both {row['both']:5.1f} n {total:.0f}"
        )

    def _mine(self, scenes: Scenes, prompts: list[str]) -> tuple[Scenes, torch.Tensor]:
        """This rank's rows and their text states."""
        rows = slice(self._ranks.rank, None, self._ranks.size)
        return scenes[rows], self._models.tower.encode_prompts(prompts[rows])

    def run(self, count: int) -> dict[str, Any]:
        """Every sampler on every kind with `count` prompts each, and on other words."""
        groups = {name: held_out_scenes(self._stage, kind, count, 50 + kind) for kind, name in enumerate(KINDS)}
        groups["gradient"] = held_out_scenes(self._stage, SINGLE, count, 60, gradient=True)
        seed = 100_003 * (1 + self._ranks.rank)
        for name, scenes in groups.items():
            mine, states = self._mine(scenes, describe(scenes, self._stage.concepts))
            real = self._stage.compose(mine)
            self.score("real renders", name, real, mine)
            self.score("vae", name, self._models.reconstruct(real), mine)
            for guidance in DDIM_GUIDANCE:
                self.score(f"ddim-50 g{guidance:g}", name, self._models.ddim(guidance, seed)(states), mine)
            for steps in LCM_STEPS:
                for guidance in LCM_GUIDANCE:
                    self.score(
                        f"lcm-{steps} g{guidance:g}", name, self._models.lcm(steps, guidance, seed)(states), mine
                    )
        self._words(count, seed)
        return self.results

    def _words(self, count: int, seed: int) -> None:
        """Synonyms drawn in training, words never seen in training, and colour adjectives."""
        concepts = list(enumerate(self._stage.concepts))
        sets = {
            "synonyms": [(i, word) for i, c in concepts for word in c.synonyms],
            "unseen words": [(i, word) for i, c in concepts for word in c.unseen],
            "own colours": [(i, f"{colour} {c.name}") for i, c in concepts for colour in c.colours],
        }
        for name, words in sets.items():
            if len(words) < self._ranks.size:
                continue
            order = np.random.default_rng(9).permutation(len(words))[:count]
            scenes, names = word_scenes(self._stage, [words[i] for i in order], 70)
            mine, states = self._mine(scenes, describe(scenes, self._stage.concepts, names))
            self.score("ddim-50 g3", name, self._models.ddim(3.0, seed)(states), mine)
            self.score("lcm-4 g2", name, self._models.lcm(4, 2.0, seed)(states), mine)
