"""The stages in order, each taking what the earlier ones left on disk."""

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from models.training import export, sheets
from models.training.captions import CaptionWriter, vocabulary
from models.training.checkpoints import Checkpoints
from models.training.compiled import Compiled
from models.training.concepts import select
from models.training.distributed import Ranks
from models.training.evaluate import Evaluation, Models
from models.training.judge import train_judge
from models.training.lcm import make_predictors, train_lcm
from models.training.networks import build_vae, frozen
from models.training.ring import Ring
from models.training.scenes import Stage
from models.training.settings import Budgets, Preset
from models.training.sprites import draw_shapes, load_pack, make_pack
from models.training.teacher import train_teacher
from models.training.text import TextTower, load_minilm, tiny_tower, unpack_minilm
from models.training.vae import VaeMoments, train_vae


def _source(data: Path, name: str) -> Path:
    """`data`/carry/name where a run was carried to another machine, else `data`/name."""
    carried = data / "carry" / name
    return carried if carried.exists() else data / name


class Run:
    """One training run on one rank. What several stages need is made when first asked for."""

    def __init__(self, preset: Preset, budgets: Budgets, data: Path, out: Path, ranks: Ranks) -> None:
        self._preset, self._budgets, self._data, self._out, self._ranks = preset, budgets, data, out, ranks
        self._checkpoints = Checkpoints(out / "checkpoints", ranks)
        self._concepts = select(preset.icons)

    @cached_property
    def scenes(self) -> Stage:
        if self._preset.icons is not None:
            pixels = draw_shapes(self._concepts, self._preset.resolution)
        else:
            pixels = load_pack(_source(self._data, "sprites.zip"), self._concepts)
        return Stage(pixels, self._concepts, self._preset.resolution, self._ranks.device)

    @cached_property
    def tower(self) -> TextTower:
        if self._preset.icons is not None:
            draft = CaptionWriter(self._concepts, tiny_tower(["a"], self._ranks.device))
            return tiny_tower(vocabulary(self._concepts, draft.phrases), self._ranks.device)
        return load_minilm(_source(self._data, "minilm"), self._ranks.device, self._ranks.dtype)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The finished VAE, frozen in training precision."""
        vae = build_vae(self._preset)
        vae.load_state_dict(self._weights("vae"))
        return frozen(vae, self._ranks.device, self._ranks.dtype)

    @cached_property
    def _ring(self) -> Ring:
        began = time.time()
        encode = Compiled(VaeMoments(self.vae), "encode", self._ranks)
        writer = CaptionWriter(self._concepts, self.tower)
        ring = Ring(self._preset, self.scenes, writer, self.tower, encode, self._ranks.dtype)
        self._ranks.log(
            f"ring of {self._preset.ring} started with {self._preset.ring_start} in {time.time() - began:.1f} s"
        )
        return ring

    @cached_property
    def models(self) -> Models:
        """The trained networks, ready to draw."""
        width = self.tower.width
        teacher, predict, student, predict_guided = make_predictors(self._preset, self._ranks, width)
        teacher.load_state_dict(self._weights("teacher"))
        student.load_state_dict(self._weights("lcm"))
        return Models(self._preset, self._ranks, self.tower, self.vae, predict, predict_guided)

    def _weights(self, stage: str) -> dict[str, Any]:
        done = self._checkpoints.finished(stage)
        if done is None:
            raise RuntimeError(f"stage '{stage}' is not finished: run it first")
        weights: dict[str, Any] = done["weights"]
        return weights

    def _record(self, name: str, value: Any) -> None:
        if self._ranks.main:
            export.write_metrics(self._out / "metrics.json", {name: value})

    def stage(self, name: str, prompts: int) -> None:
        """Run one stage, unless it is done."""
        began = time.time()
        self._ranks.log(f"--- stage {name}")
        match name:
            case "sprites":
                self._sprites()
            case "vae":
                self._train_vae()
            case "teacher" | "lcm":
                self._train_diffusion(name)
            case "judge":
                train_judge(self._preset, self.scenes, self._ranks, self._checkpoints, self._budgets.judge)
            case "eval":
                self._evaluate(prompts)
            case "export":
                self._export()
            case _:
                raise ValueError(f"stage: '{name}' is not known")
        self._ranks.log(f"--- stage {name} took {time.time() - began:.1f} s")

    def _sprites(self) -> None:
        """Make what the run needs from the packages, where it was not carried here ready-made."""
        if self._preset.icons is not None:
            return
        if self._ranks.main and not (self._data / "carry").exists():
            self._data.mkdir(parents=True, exist_ok=True)
            make_pack(self._data, self._concepts)
            unpack_minilm(self._data)
        self._ranks.barrier()

    def _train_vae(self) -> None:
        vae, figures = train_vae(self._preset, self.scenes, self._ranks, self._checkpoints, self._budgets.vae)
        self._record("vae", figures)
        if self._ranks.main:
            torch.manual_seed(0)
            pictures = self.scenes.compose(self.scenes.sample(24))
            net = frozen(vae, self._ranks.device, torch.float32)
            with torch.no_grad():
                again = net.decode(net.encode(pictures).latent_dist.mean).sample.float()
            both = torch.stack([pictures, again], 1).flatten(0, 1)
            sheets.save_sheet(both, self._out / "sheets" / "vae.webp")

    def _train_diffusion(self, name: str) -> None:
        """The teacher, or its student."""
        done = self._checkpoints.finished(name)
        if done is not None:
            self._ranks.log(f"{name}: already trained")
            return
        null = self.tower.encode_prompts([""])
        if name == "teacher":
            figures = train_teacher(
                self._preset, self._ring, null, self._ranks, self._checkpoints, self._budgets.teacher
            )
        else:
            figures = train_lcm(
                self._preset, self._ring, null, self._weights("teacher"), self._ranks, self._checkpoints,
                self._budgets.lcm,
            )  # fmt: skip
        self._record(name, figures)

    def _evaluate(self, prompts: int) -> None:
        sheets.draw_sheets(self.models, self._out / "sheets")
        judge = train_judge(self._preset, self.scenes, self._ranks, self._checkpoints, self._budgets.judge)
        self._record("evaluation", Evaluation(self.scenes, judge, self.models).run(prompts))
        if self._ranks.main:
            export.pack(self._out)

    def _export(self) -> None:
        if self._ranks.main:
            figures = export.export_bundle(
                self._out / "bundle", self._preset, self.tower.width, self._weights("vae"),
                self._weights("teacher"), self._weights("lcm"), self._ranks,
            )  # fmt: skip
            self._record("export", figures)
            self._record("concepts", len(self._concepts))
            export.pack(self._out)
        self._ranks.barrier()
