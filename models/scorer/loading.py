"""A scorer's folder: config.json, concepts.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.diffusion.folder import listing, one_line, read_json
from models.errors import ModelError
from models.scorer.config import Sizes, Thresholds, Vocabulary
from models.scorer.embedder import load_encoder
from models.scorer.network import ScorerNetwork
from models.scorer.scorer import Scorer

CONFIG, CONCEPTS, WEIGHTS = "config.json", "concepts.json", "model.safetensors"


def save_scorer(
    folder: Path, weights: Mapping[str, torch.Tensor], sizes: Sizes, vocabulary: Vocabulary, thresholds: Thresholds
) -> None:
    """Write a scorer's folder, weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, {**asdict(sizes), "thresholds": asdict(thresholds)})
    _write_json(folder / CONCEPTS, asdict(vocabulary))
    halves = {name: value.half().contiguous().cpu() for name, value in weights.items()}
    save_file(halves, folder / WEIGHTS, metadata={"format": "pt"})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_scorer(folder: Path, text_encoder_folder: Path, tokenizer_folder: Path, device: torch.device | str) -> Scorer:
    """Load a scorer beside the text encoder (BERT) and tokenizer of its bundle, in float32.

    Raises ModelError, in one line, if anything is missing, damaged, or does not fit together.
    """
    config = read_json(folder / CONFIG)
    sizes = Sizes.parse(config, folder / CONFIG)
    thresholds = Thresholds.parse(config.get("thresholds") or {}, f"{folder / CONFIG}: thresholds")
    vocabulary = Vocabulary.parse(read_json(folder / CONCEPTS), folder / CONCEPTS)
    network = ScorerNetwork(sizes, vocabulary)
    _fill(network, folder / WEIGHTS)
    encoder, tokenize = load_encoder(text_encoder_folder, tokenizer_folder)
    if encoder.config.hidden_size != sizes.text_width:
        raise ModelError(
            f"{folder} was trained on text states of width {sizes.text_width}; "
            f"{text_encoder_folder} gives {encoder.config.hidden_size}"
        )
    network = network.to(device).to(memory_format=torch.channels_last).requires_grad_(False).eval()
    return Scorer(network, encoder.to(device), tokenize, sizes, vocabulary, thresholds)


def _fill(network: ScorerNetwork, path: Path) -> None:
    """Copy the weights of a file in, all of them and no others."""
    if not path.is_file():
        raise ModelError(f"{path} is missing")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short: {one_line(error)}") from None
    wanted = network.state_dict()
    wrong = sorted(name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape)
    faults = {
        "lacks": sorted(wanted.keys() - weights.keys()),
        "has unknown": sorted(weights.keys() - wanted.keys()),
        "has wrong shapes for": wrong,
    }
    for what, names in faults.items():
        if names:
            raise ModelError(f"{path} {what} {listing(names)}")
    network.load_state_dict(weights)
