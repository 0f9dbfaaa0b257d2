"""From a name to a language model that runs.

    load_llm(name) -> resolve -> LlmConfig, Tokenizer, Decoder -> LanguageModel

Whatever is missing, damaged or of another kind ends in a ModelError of one line that names the file.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from models.bundles import registry
from models.bundles.manifest import LANGUAGE, read_manifest
from models.diffusion.dtype import resolve_device, resolve_dtype
from models.diffusion.folder import read_json
from models.diffusion.source import HUB_ID, Source, snapshot
from models.errors import ModelError
from models.llm.config import LlmConfig
from models.llm.decoder import Decoder
from models.llm.gguf import converted_folder
from models.llm.lora import Lora
from models.llm.tokenizer import Tokenizer, load_tokenizer
from models.llm.weights import fill

logger = logging.getLogger(__name__)

DEFAULT = "smollm2"  # the bundle that "default" means
HUB_FILES = ["*.json", "*.safetensors", "chat_template.jinja"]


@dataclass(frozen=True, slots=True)
class LlmCard:
    """What a request is checked against, and what /v1/models says."""

    name: str
    source: str  # folder, file or hub id
    revision: str
    max_positions: int  # prompt and answer together, in tokens
    has_chat: bool  # a chat template, without which it completes plain prompts only


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A loaded language model."""

    decoder: Decoder
    tokenizer: Tokenizer
    config: LlmConfig
    card: LlmCard


def load_llm(
    name: str = "default", *, dtype: str = "auto", device: str = "auto", cache_dir: Path, lora: str | None = None
) -> LanguageModel:
    """Load a language model for inference.

    Args:
        name: "default", a bundle, a folder in transformers' format, a .gguf file, or a hub id.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:N.
        cache_dir: where bundles, hub files and converted GGUF files are kept.
        lora: the folder of a PEFT adapter that is merged into the weights.

    Raises:
        ModelError: one line on what is missing, damaged or not served; LoraError for the adapter.
    """
    where = resolve_device(device)
    form = resolve_dtype(dtype, where)
    adapter = None if lora is None else Lora(Path(lora).expanduser())
    found = resolve(name, cache_dir)
    path = found.path / "config.json"
    config = LlmConfig.parse(read_json(path), path)
    tokenizer = load_tokenizer(found.path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{found.path} has {tokenizer.vocab_size} tokens in tokenizer.json, {config.vocab_size} in {path}"
        )
    decoder = Decoder(config, form, where)
    fill(decoder, found.path, adapter)
    card = LlmCard(found.name, found.origin, found.revision, config.max_positions, tokenizer.has_chat)
    logger.info("loaded %s (%s) on %s in %s", found.name, found.revision, where, form)
    return LanguageModel(decoder, tokenizer, config, card)


def resolve(name: str, cache_dir: Path) -> Source:
    """Find a model by its name, and convert it if it is a GGUF file."""
    bundle = DEFAULT if name == "default" else name
    if bundle in registry.ROOTS:
        manifest = read_manifest(registry.ROOTS[bundle])
        if manifest.kind != LANGUAGE:
            raise ModelError(f"bundle {bundle!r} is a {manifest.kind} model; it writes no text")
        folder = registry.language_folder(bundle, cache_dir, roots=registry.ROOTS)
        return Source(manifest.name, bundle, folder, manifest.version)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, str(path), converted_folder(path, cache_dir), "local")
    if name and path.is_dir():
        return Source(path.resolve().name, str(path), path, "local")
    if HUB_ID.fullmatch(name) and not path.exists():
        folder = snapshot(name, None, cache_dir, HUB_FILES)
        return Source(name, name, folder, folder.name)
    raise ModelError(
        f"language model {name!r} is neither default, nor a folder, nor a .gguf file, nor a hub id like owner/name"
    )
