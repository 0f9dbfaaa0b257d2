"""The stages in order, each taking what the earlier ones left on disk."""

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from models.diffusion.folder import read_json
from models.scorer import Scorer
from models.scorer.config import Thresholds
from models.scorer.loading import CONFIG, save_scorer
from models.training import export, sheets
from models.training.captions import CaptionWriter, describe, vocabulary
from models.training.checkpoints import Checkpoints
from models.training.compiled import Compiled
from models.training.concepts import select
from models.training.consistency import train_consistency, tune_consistency
from models.training.distributed import Ranks
from models.training.lcm import train_lcm, train_lcm_lora
from models.training.lora import merge, save_lora
from models.training.networks import build_unet, build_vae, frozen
from models.training.prompts import SHEET_PROMPTS
from models.training.reference import make_reference
from models.training.ring import Ring
from models.training.sampling import FixedBatch, Velocity, sample_consistency, sample_ddim, sample_lcm
from models.training.scenes import Stage
from models.training.schedule import NoiseLevels
from models.training.scorer import make_scorer, sizes_of, train_scorer, vocabulary_of
from models.training.settings import Budgets, Preset
from models.training.sprites import draw_shapes, load_pack, make_pack
from models.training.teacher import train_teacher
from models.training.text import TextTower, load_minilm, tiny_tower, unpack_minilm
from models.training.timepoints import STEPS, search
from models.training.vae import VaeMoments, decode, train_vae
from models.training.validation import calibrate
from models.training.validation import calibrate

LORAS = ("lcm-lora", "consistency", "consistency-training")
_SEARCHED = 192  # prompts that time points are searched with


def _source(data: Path, name: str) -> Path:
    """`data`/carry/name where a run was carried to another machine, else `data`/name."""
    carried = data / "carry" / name
    return carried if carried.exists() else data / name


class Run:
    """One training run on one rank. What several stages need is made when first asked for.

    `start`: a bundle or an export whose VAE and teacher the new ones start from; None starts from random weights.
    """

    def __init__(
        self, preset: Preset, budgets: Budgets, data: Path, out: Path, ranks: Ranks, start: Path | None = None
    ) -> None:
        self._preset, self._budgets, self._data, self._out, self._ranks = preset, budgets, data, out, ranks
        self._start = start
        self._checkpoints = Checkpoints(out / "checkpoints", ranks)
        self._concepts = select(preset.icons)

    @cached_property
    def scenes(self) -> Stage:
        if self._preset.icons is not None:
            pack = draw_shapes(self._concepts, self._preset.resolution)
        else:
            pack = load_pack(_source(self._data, "sprites.zip"), self._concepts)
        return Stage(pack, self._concepts, self._ranks.device)

    @cached_property
    def tower(self) -> TextTower:
        if self._preset.icons is not None:
            draft = CaptionWriter(self._concepts, tiny_tower(["a"], self._ranks.device))
            return tiny_tower(vocabulary(self._concepts, draft.phrases), self._ranks.device)
        return load_minilm(_source(self._data, "minilm"), self._ranks.device, self._ranks.dtype)

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
        done = self._checkpoints.finished(stage)
        if done is None:
            raise RuntimeError(f"stage '{stage}' is not finished: run it first")
        weights: dict[str, Any] = done["weights"]
        return weights

    def _first(self, component: str, network: Any) -> dict[str, Any] | None:
        """The weights that `component` starts from."""
        if self._start is None:
            return None
        weights: dict[str, Any] = network.from_pretrained(
            self._start / component, torch_dtype=torch.float32
        ).state_dict()
        return {name: value.to(self._ranks.device) for name, value in weights.items()}

    def _record(self, name: str, value: Any) -> None:
        if self._ranks.main:
            export.write_metrics(self._out / "metrics" / f"{name}.json", value)

    def stage(self, name: str) -> None:
        """Run one stage, unless it is done."""
        began = time.time()
        self._ranks.log(f"--- stage {name}")
        match name:
            case "sprites":
                self._sprites()
            case "vae":
                self._train_vae()
            case "scorer":
                self._train_scorer()
            case "teacher":
                self._train_teacher()
            case "lcm" | "lcm-lora" | "consistency" | "consistency-training":
                self._train_student(name)
            case "sheets":
                self._draw_sheets()
            case "export":
                self._export()
            case "reference":
                self._reference()
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
        first = self._first("vae", AutoencoderKL)
        vae, figures = train_vae(self._preset, self.scenes, first, self._ranks, self._checkpoints, self._budgets.vae)
        self._record("vae", figures)
        if self._ranks.main:
            torch.manual_seed(0)
            pictures = self.scenes.compose(self.scenes.sample(32), self._preset.resolution)
            net = frozen(vae, self._ranks.device, torch.float32)
            with torch.no_grad():
                again = net.decode(net.encode(pictures).latent_dist.mean).sample.float()
            both = torch.stack([pictures, again], 1).flatten(0, 1)
            sheets.save_sheet(both, self._out / "sheets" / "vae.webp")

    def _train_scorer(self) -> None:
        train_scorer(
            self._preset, self.scenes, self.writer, self.tower, self._ranks, self._checkpoints, self._budgets.scorer
        )

    def _train_teacher(self) -> None:
        if self._checkpoints.finished("teacher") is None:
            figures = train_teacher(
                self._preset, *self._rings, self._null, self._first("unet", UNet2DConditionModel), self._ranks,
                self._checkpoints, self._budgets.teacher,
            )  # fmt: skip
            self._record("teacher", figures)

    def _train_student(self, name: str) -> None:
        if self._checkpoints.finished(name) is not None:
            return
        common = (self._null, self._weights("teacher"), self._ranks, self._checkpoints)
        match name:
            case "lcm":
                usual, large = self._rings
                figures = train_lcm(self._preset, usual, *common, self._budgets.lcm, large)
            case "lcm-lora":
                figures = train_lcm_lora(self._preset, self._rings[0], *common, self._budgets.lcm_lora)
            case "consistency":
                figures = train_consistency(self._preset, self._rings[0], *common, self._budgets.consistency)
            case _:
                seconds = self._budgets.consistency_training
                figures = tune_consistency(self._preset, self._rings[0], *common, seconds)
        self._record(name, figures)

    def _predictors(self, name: str) -> FixedBatch:
        """The velocity of a finished network, without gradients: eager, since it is asked for few pictures."""
        teacher = self._weights("teacher")
        weights = merge(teacher, self._weights(name)) if name in LORAS else self._weights(name)
        unet = build_unet(self._preset, self.tower.width, guided=name == "lcm")
        unet.load_state_dict(weights)
        unet = frozen(unet, self._ranks.device, self._ranks.dtype)
        return FixedBatch(Velocity(unet, self._ranks.dtype), self._ranks.share(self._preset.unet_batch))

    @torch.no_grad()
    def _pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Decoded and clamped [B, 3, H, H]."""
        return torch.cat([decode(self.vae, part).clamp(-1, 1) for part in latents.split(64)])

    def _draw_sheets(self) -> None:
        """The same prompts by the teacher and by each student, with the same seeds."""
        if not self._ranks.main:
            return
        preset, ranks, side = self._preset, self._ranks, self._preset.latent
        states, guidance = self.tower.encode_prompts(SHEET_PROMPTS), preset.distilled_guidance
        teacher = self._predictors("teacher")
        for scale, folder in ((1, "usual"), (2, "large")):
            latents = sample_ddim(teacher, states, self._null, scale * side, ranks, guidance=guidance, seed=1)
            sheets.save_sheet(self._pictures(latents), self._out / "sheets" / folder / "ddim-50.webp")
        for name, fixed in (("lcm", None), ("lcm-lora", guidance)):
            predict = self._predictors(name)
            for steps in STEPS:
                latents = sample_lcm(
                    predict, states, side, ranks, guidance=guidance if fixed is None else None,
                    guidance_width=preset.guidance_width, seed=1, steps=steps,
                )  # fmt: skip
                sheets.save_sheet(self._pictures(latents), self._out / "sheets" / f"{name}-{steps}.webp")

    def _time_points(self, name: str, scorer: Scorer, prompts: Sequence[str]) -> dict[int, list[float]]:
        """Sigmas of consistency sampling by number of steps: those at which the scorer likes the pictures best."""
        predict, states = self._predictors(name), self.tower.encode_prompts(prompts)
        wanted = scorer.embed_text(prompts)

        def quality(sigmas: Sequence[float]) -> float:
            latents = sample_consistency(predict, states, self._preset.latent, self._ranks, sigmas=sigmas, seed=3)
            return float((scorer.read(self._pictures(latents)).embedding * wanted).sum(1).mean())

        return {steps: search(quality, NoiseLevels(self._ranks.device).low, steps) for steps in STEPS}

    def _export(self) -> None:
        """Everything that a bundle holds, from the finished stages; from rank 0."""
        if self._ranks.main:
            bundle, preset = self._out / "bundle", self._preset
            figures = export.export_networks(
                bundle, preset, self.tower.width, self._weights("vae"), self._weights("teacher"), self._weights("lcm"),
                self._ranks,
            )  # fmt: skip
            save_lora(self._weights("lcm-lora"), bundle / "lora" / "lcm.safetensors")
            save_lora(self._weights("consistency"), bundle / "lora" / "consistency.safetensors")
            save_lora(
                self._weights("consistency-training"), self._out / "unshipped" / "consistency-training.safetensors"
            )
            weights = self._weights("scorer")
            thresholds, validation = calibrate(preset, weights, self.scenes, self.writer, self.tower)
            save_scorer(
                bundle / "scorer", weights, sizes_of(preset, self.tower.width), vocabulary_of(self.scenes), thresholds
            )
            scorer = make_scorer(preset, weights, self.scenes, self.tower, thresholds)
            prompts = describe(self.scenes.sample(min(_SEARCHED, self._preset.unet_batch)), self._concepts)
            points = {
                name: self._time_points(name, scorer, prompts) for name in ("consistency", "consistency-training")
            }
            export.write_metrics(self._out / export.STUDENTS, export.students(preset, points["consistency"]))
            export.write_metrics(self._out / "unshipped" / "time-points.json", points)
            self._record("export", figures)
            self._record("scorer-validation", validation)
            self._record("concepts", len(self._concepts))
        self._ranks.barrier()

    def _reference(self) -> None:
        """The evaluation prompts and what real renders reach; then everything that is to leave the machine."""
        if self._ranks.main:
            weights = self._weights("scorer")
            config = self._out / "bundle" / "scorer" / CONFIG
            thresholds = Thresholds.parse(read_json(config)["thresholds"], config)
            scorer = make_scorer(self._preset, weights, self.scenes, self.tower, thresholds)
            writer = CaptionWriter(self._concepts, self.tower, unseen=True)
            make_reference(
                self._out / "bundle" / "eval", self.scenes, writer, scorer, self.vae, self._preset.resolution
            )
            export.pack(self._out)
        self._ranks.barrier()
