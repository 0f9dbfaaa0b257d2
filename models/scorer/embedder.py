"""Prompts to the unit vectors that the approximate cache compares: the scorer's text side, without its image tower.

Nothing here imports open_clip, which takes seconds.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, BertModel

from models.diffusion.folder import load_module, one_line, quiet_libraries
from models.diffusion.text import VOCABULARIES
from models.errors import ModelError

REMEMBERED = 4096  # prompts; a few megabytes
PROJECTION = "projection.weight"  # of the scorer's weights: [E, text width]

_BATCH = 32

Tokenize = Callable[[Sequence[str]], torch.Tensor]


class Embedder:
    """Embeds on the CPU in float32, and remembers the prompts seen last. Thread-safe."""

    def __init__(self, encoder: BertModel, tokenize: Tokenize, projection: torch.Tensor | None = None) -> None:
        """`projection`: [E, text width], applied to the mean of the encoder's states; None: nothing is."""
        self._encoder, self._tokenize, self._projection = encoder, tokenize, projection
        self._known: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()  # by owner and prompt
        self._lock = threading.Lock()

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        width = self._encoder.config.hidden_size if self._projection is None else len(self._projection)
        return int(width)

    def embed(self, prompts: Sequence[str], owner: str = "") -> np.ndarray:
        """Unit vectors [N, E] float32; a prompt is cut where the tokenizer's length ends.

        owner: whose prompts they are. They are remembered for each alone, so that no one can tell, by the time that it
            takes, what others have asked for.
        """
        rows = np.empty((len(prompts), self.dimension), np.float32)
        with self._lock:
            missing = [prompt for prompt in dict.fromkeys(prompts) if (owner, prompt) not in self._known]
            fresh: dict[str, np.ndarray] = {}
            for start in range(0, len(missing), _BATCH):
                part = missing[start : start + _BATCH]
                fresh.update(zip(part, self._run(part), strict=True))
            for row, prompt in zip(rows, prompts, strict=True):
                key = (owner, prompt)
                row[:] = self._known[key] = fresh[prompt] if prompt in fresh else self._known[key]
                self._known.move_to_end(key)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return rows

    @torch.inference_mode()
    def _run(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """As `Scorer.embed_text`."""
        ids = self._tokenize(prompts)
        mask = (ids != self._encoder.config.pad_token_id).long()
        states = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        pooled = states.sum(1) / mask.sum(1, keepdim=True)
        if self._projection is not None:
            pooled = F.linear(pooled, self._projection)
        return [row.copy() for row in F.normalize(pooled, dim=-1).numpy()]


def load_embedder(scorer: Path | None, text_encoder: Path, tokenizer: Path) -> Embedder:
    """Load the text side of a scorer's folder, or the text encoder alone.

    Raises ModelError, in one line, if anything is missing, damaged, or does not fit together.
    """
    encoder, tokenize = load_encoder(text_encoder, tokenizer)
    projection = None if scorer is None else _projection(scorer / "model.safetensors")
    if projection is not None and projection.shape[1] != encoder.config.hidden_size:
        raise ModelError(
            f"{scorer} was trained on text states of width {projection.shape[1]}; "
            f"{text_encoder} gives {encoder.config.hidden_size}"
        )
    return Embedder(encoder, tokenize, projection)


def load_encoder(text_encoder: Path, tokenizer: Path) -> tuple[BertModel, Tokenize]:
    """A BERT encoder in float32, and what turns prompts into its padded ids [N, L]. Raises ModelError."""
    encoder: BertModel = load_module(BertModel, text_encoder, torch.float32, dtype_argument="dtype")
    if not any(all((tokenizer / file).is_file() for file in files) for files in VOCABULARIES):
        raise ModelError(f"{tokenizer} holds no vocabulary")
    try:
        with quiet_libraries():
            tokens = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{tokenizer} holds no tokenizer: {one_line(error)}") from error

    def tokenize(prompts: Sequence[str]) -> torch.Tensor:
        ids: torch.Tensor = tokens(list(prompts), padding=True, truncation=True, return_tensors="pt").input_ids
        return ids

    return encoder, tokenize


def _projection(path: Path) -> torch.Tensor:
    if not path.is_file():
        raise ModelError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            weight: torch.Tensor = file.get_tensor(PROJECTION)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short: {one_line(error)}") from None
    return weight.float()
