"""A folder in diffusers' format: what it says it holds, and its weights loaded strictly.

diffusers and transformers only warn when a checkpoint lacks weights and go on with random ones. Here that is an error,
and so is anything left over; the message names the file.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from models.errors import ModelError

WEIGHT_STEMS = ("diffusion_pytorch_model", "model")  # diffusers' name for weights, and transformers'
HARMLESS = ("position_ids",)  # a buffer that old transformers saved and that is computed today


@dataclass(frozen=True, slots=True)
class Folder:
    """The root of a pipeline: `pipeline` is its class, `components` maps a subfolder to its class name."""

    path: Path
    pipeline: str
    components: Mapping[str, str]
    options: Mapping[str, Any]  # the pipeline's own settings, such as force_zeros_for_empty_prompt

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """A component's JSON config."""
        return read_json(self.path / component / file)

    def component(self, name: str, served: tuple[str, ...]) -> str:
        """The component's class name, which must be one of those served."""
        cls = self.components.get(name)
        index = self.path / "model_index.json"
        if cls is None:
            raise ModelError(f"{index} names no {name}, which {self.pipeline} needs")
        if cls not in served:
            raise ModelError(f"{index}: {name} is a {cls}; served are {', '.join(served)}")
        if not (self.path / name).is_dir():
            raise ModelError(f"{self.path / name} is missing, though {index} names it")
        return cls


def read_folder(path: Path) -> Folder:
    """Read model_index.json."""
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder")
    index = read_json(path / "model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise ModelError(f"{path / 'model_index.json'} names no pipeline (_class_name)")
    listed = {key: value for key, value in index.items() if isinstance(value, list) and len(value) == 2}
    components = {key: value[1] for key, value in listed.items() if value[1] is not None}
    options = {key: value for key, value in index.items() if key not in listed and not key.startswith("_")}
    return Folder(path, pipeline, components, options)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ModelError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def load_module(cls: Any, path: Path, dtype: torch.dtype, *, dtype_argument: str) -> Any:
    """Load one component's module, every weight from its file and every weight of the file used.

    Weights are mapped from disk and cast one by one, so that the module is never in memory twice.

    Args:
        cls: a diffusers or transformers model class.
        path: the component's folder.
        dtype_argument: what the library calls the dtype: "torch_dtype" (diffusers) or "dtype" (transformers).
    """
    weights = _check_weights(path)
    read_json(path / "config.json")
    arguments = {dtype_argument: dtype, "low_cpu_mem_usage": True, "local_files_only": True}
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # mismatches go into the report
    try:
        with quiet_libraries():
            module, report = cls.from_pretrained(path, **arguments)
    except Exception as error:
        raise ModelError(f"{weights} does not fit {path / 'config.json'}: {one_line(error)}") from error
    missing = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.endswith(HARMLESS))
    mismatched = sorted(str(key[0]) for key in report["mismatched_keys"])  # (key, shape in the file, shape wanted)
    for what, keys in (("lacks", missing), ("has unknown", unexpected), ("has wrong shapes for", mismatched)):
        if keys:
            raise ModelError(f"{weights} {what} {listing(keys)}")
    return module.requires_grad_(False).eval()


def _check_weights(path: Path) -> Path:
    """Find a component's weights, check that every safetensors file is whole, return the file that stands for them."""
    for stem in WEIGHT_STEMS:
        if (index := path / f"{stem}.safetensors.index.json").is_file():
            shards = read_json(index).get("weight_map", {})
            for shard in sorted(set(shards.values())):
                names = _check_safetensors(path / shard)
                absent = sorted(name for name, file in shards.items() if file == shard and name not in names)
                if absent:  # the library would leave these weights without data
                    raise ModelError(f"{path / shard} lacks {listing(absent)}")
            return index
        if (single := path / f"{stem}.safetensors").is_file():
            _check_safetensors(single)
            return single
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise ModelError(f"{path} holds no weights: looked for {' and '.join(f'{s}.safetensors' for s in WEIGHT_STEMS)}")


def _check_safetensors(path: Path) -> set[str]:
    """The names of the tensors in a file that is whole."""
    if not path.is_file():
        raise ModelError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:  # compares the header's offsets with the file's size
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short: {one_line(error)}") from None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers' and transformers' warnings and progress bars from the user; what matters becomes an error."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity(library.CRITICAL)
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listing(keys: list[str], shown: int = 3) -> str:
    """The first few of many names."""
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more
