"""Export: diffusers folders in float16, sharded; the archives in which they leave a machine; and publishing.

A machine that gives back only small files is served by `pack`: pieces of tar archives, joined again with
`cat packs/NAME/NAME.tar.* | tar x`.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, UNet2DConditionModel
from torch import nn

from models.bundles.manifest import MANIFEST, seal
from models.diffusion.folder import read_json
from models.errors import ModelError
from models.training.distributed import Ranks
from models.training.networks import build_unet, build_vae
from models.training.sampling import ORIGINAL_STEPS, guidance_embedding
from models.training.schedule import BETA_END, BETA_START, SIGMA_MAX, STEPS, NoiseLevels
from models.training.settings import FULL, Preset
from models.training.text import LENGTH

FOLDERS = ("unet", "unet_lcm", "vae", "scheduler", "scheduler_lcm", "lora", "scorer", "eval")
SHARD = "15MB"
_PIECE = 31 * 2**19  # 15.5 MiB, under the 16 MiB that one file may have
_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": STEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def teacher_scheduler() -> DDIMScheduler:
    """DDIM as the teacher was trained for."""
    return DDIMScheduler(**_SCHEDULE, timestep_spacing="trailing", steps_offset=1)


def student_scheduler() -> LCMScheduler:
    """LCM as the student was distilled for."""
    return LCMScheduler(**_SCHEDULE, original_inference_steps=ORIGINAL_STEPS, timestep_scaling=10.0)


@torch.no_grad()
def _output(unet: UNet2DConditionModel, preset: Preset, text_width: int, device: torch.device) -> torch.Tensor:
    """The UNet's answer to fixed random inputs, float32."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, unet.dtype)

    noisy, states = random(4, 4, preset.latent, preset.latent), random(4, LENGTH, text_width)
    omega = torch.linspace(0, 6, 4, device=device)
    guidance = (
        guidance_embedding(omega, preset.guidance_width).to(unet.dtype) if unet.config.time_cond_proj_dim else None
    )
    timestep = torch.tensor([999, 700, 300, 20], device=device)
    output: torch.Tensor = unet(noisy, timestep, states, timestep_cond=guidance, return_dict=False)[0].float()
    return output


def _halved(network: nn.Module) -> int:
    """Round weights to float16 in place; returns how many became non-finite (should be 0)."""
    network.half()
    return sum(int((~parameter.isfinite()).sum()) for parameter in network.parameters())


def export_unet(
    weights: dict[str, Any], folder: Path, preset: Preset, text_width: int, ranks: Ranks, *, guided: bool
) -> dict[str, float]:
    """Write the UNet; returns the relative errors that float16 weights, and float16 arithmetic, bring."""
    unet = build_unet(preset, text_width, guided=guided).to(ranks.device).eval()
    unet.load_state_dict(weights)
    exact = _output(unet, preset, text_width, ranks.device)
    bad = _halved(unet)
    figures: dict[str, float] = {"non_finite_weights": float(bad)}
    if ranks.cuda:
        half = _output(unet, preset, text_width, ranks.device)
        figures["float16_arithmetic_error"] = float((half - exact).norm() / exact.norm())
    unet.cpu().save_pretrained(folder, max_shard_size=SHARD)
    rounded = _output(unet.to(ranks.device).float(), preset, text_width, ranks.device)
    figures["float16_weights_error"] = float((rounded - exact).norm() / exact.norm())
    return figures


def export_vae(weights: dict[str, Any], folder: Path, preset: Preset, ranks: Ranks) -> dict[str, float]:
    """Write the VAE; returns the relative error of decoding in float16 (as float32 where there is no GPU)."""
    vae: AutoencoderKL = build_vae(preset).to(ranks.device).eval()
    vae.load_state_dict(weights)
    latents = torch.randn(4, 4, preset.latent, preset.latent, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = vae.decode(latents.to(ranks.device)).sample
        bad = _halved(vae)
        vae.cpu().save_pretrained(folder, max_shard_size=SHARD)
        dtype = torch.float16 if ranks.cuda else torch.float32
        half = vae.to(ranks.device, dtype).decode(latents.to(ranks.device, dtype)).sample.float()
    return {"non_finite_weights": float(bad), "float16_error": float((half - exact).norm() / exact.norm())}


def students(guidance: float, time_points: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A manifest's "students" and "loras": what the LoRAs beside the teacher are for.

    `guidance`: the scale distilled into them. `time_points`: sigmas of consistency sampling by number of steps.
    """
    consistency = {
        "lora": "lora/consistency.safetensors",
        "sigma_min": NoiseLevels(torch.device("cpu")).low,
        "sigma_max": SIGMA_MAX,
        "sigma_data": 1.0,
        "guidance_scale": guidance,
        "sigmas": dict(time_points),
    }
    lcm_lora = {"file": "lora/lcm.safetensors", "sampler": "lcm", "guidance_scale": guidance}
    return {"students": {"consistency": consistency}, "loras": {"lcm-lora": lcm_lora}}


def _pieces(folder: Path, name: str, members: list[Path], root: Path) -> None:
    """A tar of `members` (paths relative to `root`) as `folder`/`name`.tar.00, .01, …"""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            tar.add(member, arcname=str(member.relative_to(root)))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}.tar.*"):
        old.unlink()
    data = buffer.getvalue()
    for number, start in enumerate(range(0, len(data), _PIECE)):
        (folder / f"{name}.tar.{number:02d}").write_bytes(data[start : start + _PIECE])


def pack(out: Path) -> None:
    """Archives under `out`/packs/{teacher,lcm,rest}: each at most a few pieces, to be fetched one group at a time."""
    bundle = out / "bundle"
    large = {"teacher": bundle / "unet", "lcm": bundle / "unet_lcm"}
    groups = {name: [folder] for name, folder in large.items()}
    groups["rest"] = [path for path in sorted(bundle.iterdir()) if path not in large.values()]
    groups["rest"] += [out / "metrics", out / "sheets", out / "unshipped"]
    for name, members in groups.items():
        _pieces(out / "packs" / name, name, [member for member in members if member.exists()], out)


def write_metrics(path: Path, values: Any) -> None:
    """`values` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_metrics(out: Path) -> dict[str, Any]:
    """The figures of every stage that has been run, by its name."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "metrics").glob("*.json"))
    }


def publish(out: Path, destination: Path) -> None:
    """Put the exported folders into `destination`, a bundle with a manifest, and write its figures and digests.

    Args:
        out: a finished run: its bundle/ has the networks, its metrics/ become the manifest's "training".
        destination: keeps its other files, such as the configurations of the text tower.

    Raises:
        ModelError: a stage is not finished, or `destination` has no manifest. Nothing is changed then.
    """
    path, bundle = destination / MANIFEST, out / "bundle"
    manifest = read_json(path)
    for name in FOLDERS:
        if not (bundle / name).is_dir():
            raise ModelError(f"{bundle / name} is missing: run every stage first")
    for name in FOLDERS:
        if (destination / name).exists():
            shutil.rmtree(destination / name)
        shutil.copytree(bundle / name, destination / name)
    manifest["training"] = _rounded(read_metrics(out))
    manifest |= students(FULL.distilled_guidance, manifest["training"]["consistency"]["sigmas"])
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    seal(destination)


def _rounded(value: Any) -> Any:
    """Floats to four significant digits, wherever they stand."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if not isinstance(value, float):
        return value
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() else short
