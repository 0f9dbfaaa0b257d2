"""What travels to a machine without a network: sprites, the text tower in float16, and wheels."""

import shutil
import subprocess
import sys
from pathlib import Path

from models.training.concepts import load_concepts
from models.training.sprites import make_pack
from models.training.text import unpack_minilm

WHEELS = (
    "diffusers==0.42.1", "importlib_metadata==8.7.0", "open_clip_torch==3.3.0", "ftfy==6.3.1", "wcwidth==0.9.4",
)  # fmt: skip


def make_carry(data: Path) -> Path:
    """Fill `data`/carry; returns it."""
    folder = data / "carry"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(make_pack(data, load_concepts()), folder / "sprites.zip")
    shutil.copytree(unpack_minilm(data), folder / "minilm", dirs_exist_ok=True)
    if len(list(folder.glob("*.whl"))) < len(WHEELS):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        subprocess.run([*pip, *WHEELS], check=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return folder
