"""The stages in order, each taking what the earlier ones left on disk."""

import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from models.bundles.manifest import MANIFEST
from models.diffusion.folder import read_json
from models.errors import ModelError
from models.scorer import Scorer
from models.scorer.config import Thresholds
from models.scorer.loading import CONFIG, save_scorer
from models.training import export
from models.training.captions import CaptionWriter, describe, vocabulary
from models.training.checkpoints import Checkpoints
from models.training.compiled import Compiled
from models.training.concepts import select
from models.training.consistency import train_consistency, tune_consistency
from models.training.distributed import Ranks
from models.training.lcm import train_lcm, train_lcm_lora
from models.training.lora import save_lora
from models.training.networks import build_vae, frozen
from models.training.painter import Painter
from models.training.reference import make_reference
from models.training.ring import Ring
from models.training.scenes import Stage
from models.training.scorer import make_scorer, sizes_of, train_scorer, vocabulary_of
from models.training.settings import Budgets, Preset
from models.training.sheets import save_sheet
from models.training.sprites import draw_shapes, load_pack, make_pack
from models.training.teacher import train_teacher
from models.training.text import TextTower, load_minilm, tiny_tower, unpack_minilm
from models.training.vae import VaeMoments, train_vae
from models.training.validation import calibrate

# Stage: its training, and where its LoRA goes in the run's folder.
LORAS: dict[str, tuple[Callable[..., dict[str, Any]], Path]] = {
    "lcm-lora": (train_lcm_lora, Path("bundle/lora/lcm.safetensors")),
    "consistency": (train_consistency, Path("bundle/lora/consistency.safetensors")),
    "consistency-training": (tune_consistency, Path("unshipped/consistency-training.safetensors")),
}
GUIDANCE_INPUT = "time_embedding.cond_proj.weight"  # of UNets that take the guidance scale: students
TRAINED = ("vae", "scorer", "teacher", "lcm", *LORAS)


class Run:
    """One training run on one rank. What several stages need is made when first asked for.

    `start`: a bundle or an export whose VAE and teacher the new ones start from; None starts from random weights.
    `given`: a bundle whose VAE and scorer, if it has them, are taken as they are instead of being trained.
    """

    def __init__(
        self,
        preset: Preset,
        budgets: Budgets,
        data: Path,
        out: Path,
        ranks: Ranks,
        start: Path | None = None,
        given: Path | None = None,
    ) -> None:
        self._preset, self._budgets, self._data, self._out, self._ranks = preset, budgets, data, out, ranks
        self._start = start
        self._given = {
            part: given / part for part in ("vae", "scorer") if given is not None and (given / part).is_dir()
        }
        self._checkpoints = Checkpoints(out / "checkpoints", ranks)
        self._concepts = select(preset.icons)
        self._bundle = out / "bundle"

    @cached_property
    def scenes(self) -> Stage:
        if self._preset.icons is not None:
            pack = draw_shapes(self._concepts, self._preset.resolution)
        else:
            pack = load_pack(self._data / "sprites.zip", self._concepts)
        return Stage(pack, self._concepts, self._ranks.device)

    @cached_property
    def tower(self) -> TextTower:
        if self._preset.icons is not None:
            draft = CaptionWriter(self._concepts, tiny_tower(["a"], self._ranks.device))
            return tiny_tower(vocabulary(self._concepts, draft.phrases), self._ranks.device)
        return load_minilm(self._data / "minilm", self._ranks.device, self._ranks.dtype)

    @cached_property
    def writer(self) -> CaptionWriter:
        return CaptionWriter(self._concepts, self.tower)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The finished VAE, frozen in training precision."""
        vae = build_vae(self._preset)
        vae.load_state_dict(self._weights("vae"))
        return frozen(vae, self._ranks.device, self._ranks.dtype)

    @cached_property
    def _null(self) -> torch.Tensor:
        return self.tower.encode_prompts([""])

    def _ring(self, scale: int) -> Ring:
        """Examples of `scale` times the usual side."""
        began = time.time()
        name = "encode" if scale == 1 else "large encode"
        encode = Compiled(VaeMoments(self.vae), name, self._ranks)
        ring = Ring(self._preset, self.scenes, self.writer, self.tower, encode, self._ranks.dtype, scale)
        self._ranks.log(f"ring of scale {scale} started in {time.time() - began:.1f} s")
        return ring

    @cached_property
    def _rings(self) -> tuple[Ring, Ring]:
        return self._ring(1), self._ring(2)

    def _weights(self, stage: str) -> dict[str, Any]:
        """Float32 weights of a finished stage, or of a part that the run was given."""
        if stage in self._given:
            return self._stored(self._given[stage])
        done = self._checkpoints.finished(stage)
        if done is None:
            raise ModelError(f"stage '{stage}' is not finished: run it first")
        weights: dict[str, Any] = done["weights"]
        return weights

    def _stored(self, folder: Path) -> dict[str, Any]:
        """Float32 weights of a folder's safetensors files."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no weights")
        shards = [load_file(file, device=str(self._ranks.device)) for file in files]
        return {name: value.float() for shard in shards for name, value in shard.items()}

    def _first(self, component: str) -> dict[str, Any] | None:
        """The weights that `component` starts from. Raises ModelError for a student in the teacher's place."""
        if self._start is None:
            return None
        weights = self._stored(self._start / component)
        if GUIDANCE_INPUT in weights:
            raise ModelError(f"{self._start / component} is an LCM student, where the teacher is expected")
        return weights

    def _record(self, name: str, value: Any) -> None:
        if self._ranks.main:
            export.write_metrics(self._out / "metrics" / f"{name}.json", value)

    def stage(self, name: str) -> None:
        """Run one stage; a trained one only if its figures are not there."""
        began = time.time()
        self._ranks.log(f"--- stage {name}")
        if name in TRAINED and (self._out / "metrics" / f"{name}.json").exists():
            self._ranks.log(f"{name}: is finished")
        elif name in self._given:
            self._take(name)
        else:
            self._run(name)
        self._ranks.barrier()
        self._ranks.log(f"--- stage {name} took {time.time() - began:.1f} s")

    def _run(self, name: str) -> None:
        match name:
            case "sprites":
                self._sprites()
            case "vae":
                self._train_vae()
            case "scorer":
                self._train_scorer()
            case "teacher":
                self._train_teacher()
            case "lcm":
                self._train_lcm()
            case "reference":
                self._reference()
            case "sheets":
                if self._ranks.main:
                    self._painter.draw_sheets(self._out / "sheets")
            case "pack":
                if self._ranks.main:
                    export.pack(self._out)
            case _ if name in LORAS:
                self._train_lora(name)
            case _:
                raise ValueError(f"stage: '{name}' is not known")

    def _take(self, name: str) -> None:
        """Put a part that the run was given among its own, with the figures that its bundle has of it."""
        if self._ranks.main:
            folder = self._given[name]
            shutil.copytree(folder, self._bundle / name, dirs_exist_ok=True)
            self._record(name, read_json(folder.parent / MANIFEST)["training"][name])
            self._ranks.log(f"{name}: taken from {folder}")

    def _figures(self, name: str, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a stage's training, which may have ended before this process began."""
        done = self._checkpoints.finished(name)
        return train() if done is None else dict(done["figures"])

    def _sprites(self) -> None:
        """Make what the run needs from the packages, of which those are fetched that are not there."""
        if self._preset.icons is None and self._ranks.main:
            self._data.mkdir(parents=True, exist_ok=True)
            make_pack(self._data, self._concepts)
            unpack_minilm(self._data)

    def _train_vae(self) -> None:
        vae, figures = train_vae(
            self._preset, self.scenes, self._first("vae"), self._ranks, self._checkpoints, self._budgets.vae
        )
        if self._ranks.main:
            figures |= export.export_vae(vae.state_dict(), self._bundle / "vae", self._preset, self._ranks)
            torch.manual_seed(0)
            pictures = self.scenes.compose(self.scenes.sample(32), self._preset.resolution)
            net = frozen(vae, self._ranks.device, torch.float32)
            with torch.no_grad():
                again = net.decode(net.encode(pictures).latent_dist.mean).sample.float()
            both = torch.stack([pictures, again], 1).flatten(0, 1)
            save_sheet(both, self._out / "sheets" / "vae.webp")
            self._record("vae", figures)

    def _train_scorer(self) -> None:
        preset = self._preset
        vae = None
        earlier = self._weights("vae") if "vae" in self._given else self._first("vae")
        if earlier is not None:
            vae = build_vae(preset)
            vae.load_state_dict(earlier)
            vae = frozen(vae, self._ranks.device, self._ranks.dtype)
        weights, figures = train_scorer(
            preset, self.scenes, self.writer, self.tower, self._ranks, self._checkpoints, self._budgets.scorer, vae
        )
        if self._ranks.main:
            thresholds, validation = calibrate(preset, weights, self.scenes, self.writer, self.tower, preset.validated)
            sizes, vocabulary = sizes_of(preset, self.tower.width), vocabulary_of(self.scenes)
            save_scorer(self._bundle / "scorer", weights, sizes, vocabulary, thresholds)
            self._record("scorer", figures | {"concepts": len(self._concepts), "validation": validation})

    def _train_teacher(self) -> None:
        figures = self._figures(
            "teacher",
            lambda: train_teacher(
                self._preset, *self._rings, self._null, self._first("unet"), self._ranks, self._checkpoints,
                self._budgets.teacher,
            ),
        )  # fmt: skip
        if self._ranks.main:
            weights = self._weights("teacher")
            figures |= export.export_unet(
                weights, self._bundle / "unet", self._preset, self.tower.width, self._ranks, guided=False
            )
            export.teacher_scheduler().save_pretrained(self._bundle / "scheduler")
            self._record("teacher", figures)

    def _train_lcm(self) -> None:
        figures = self._figures(
            "lcm",
            lambda: train_lcm(
                self._preset, self._rings[0], self._null, self._weights("teacher"), self._ranks, self._checkpoints,
                self._budgets.lcm, self._rings[1],
            ),
        )  # fmt: skip
        if self._ranks.main:
            weights = self._weights("lcm")
            figures |= export.export_unet(
                weights, self._bundle / "unet_lcm", self._preset, self.tower.width, self._ranks, guided=True
            )
            export.student_scheduler().save_pretrained(self._bundle / "scheduler_lcm")
            self._record("lcm", figures)

    def _train_lora(self, name: str) -> None:
        """A student that is a LoRA of the teacher; consistency models are given their time points too."""
        train, file = LORAS[name]
        seconds = getattr(self._budgets, name.replace("-", "_"))
        figures = self._figures(
            name,
            lambda: train(
                self._preset, self._rings[0], self._null, self._weights("teacher"), self._ranks, self._checkpoints,
                seconds,
            ),
        )  # fmt: skip
        if self._ranks.main:
            save_lora(self._weights(name), self._out / file)
            if name != "lcm-lora":
                prompts = describe(self.scenes.sample(self._preset.searched), self._concepts)
                figures["sigmas"] = self._painter.time_points(name, self._scorer, prompts)
            self._record(name, figures)

    @cached_property
    def _painter(self) -> Painter:
        return Painter(self._preset, self._ranks, self.tower, self.vae, self._weights)

    @cached_property
    def _scorer(self) -> Scorer:
        """The finished scorer with its thresholds."""
        config = self._given.get("scorer", self._bundle / "scorer") / CONFIG
        thresholds = Thresholds.parse(read_json(config)["thresholds"], config)
        return make_scorer(self._preset, self._weights("scorer"), self.scenes, self.tower, thresholds)

    def _reference(self) -> None:
        """The evaluation prompts and what real renders reach."""
        if self._ranks.main:
            writer = CaptionWriter(self._concepts, self.tower, unseen=True)
            make_reference(self._bundle / "eval", self.scenes, writer, self._scorer, self.vae, self._preset.resolution)
