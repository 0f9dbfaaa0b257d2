"""Prompts to text states, as diffusers' pipelines encode them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.diffusion.folder import Folder, load_module, one_line, quiet_libraries
from models.diffusion.model import TextStates
from models.errors import ModelError

ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "BertModel")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "BertTokenizer", "BertTokenizerFast")
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
CACHED_PROMPTS = 256


@dataclass(frozen=True, slots=True)
class Tower:
    """One text encoder and its tokenizer."""

    tokenizer: Any
    encoder: Any

    def __call__(self, prompts: Sequence[str], *, hidden_states: bool) -> Any:
        """Run the encoder on prompts padded or cut to the tokenizer's length."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.encoder.device)
        masked = getattr(self.encoder.config, "use_attention_mask", False)
        return self.encoder(
            tokens.input_ids,
            attention_mask=tokens.attention_mask if masked else None,
            output_hidden_states=hidden_states,
        )

    def unread(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens of each prompt are cut off at the tokenizer's length."""
        limit = self.tokenizer.model_max_length
        encoded = self.tokenizer(list(prompts), verbose=False)["input_ids"]  # or it warns of what is cut off anyway
        return [max(0, len(ids) - limit) for ids in encoded]


class TextEncoder:
    """All towers of a model, and the states of the prompts seen last.

    Args:
        towers: one; or two for SDXL, whose states are the towers' penultimate layers side by side and the last tower's
            pooled projection.
    """

    def __init__(self, towers: Sequence[Tower]) -> None:
        self.towers = tuple(towers)
        self._states: OrderedDict[Hashable, TextStates] = OrderedDict()

    @property
    def max_tokens(self) -> int:
        """The longest prompt, in tokens, that every tower reads whole."""
        return min(int(tower.tokenizer.model_max_length) for tower in self.towers)

    def encode(self, prompts: Sequence[str], variant: Hashable = None) -> list[TextStates]:
        """Encode the prompts that are not remembered, in one batch.

        Args:
            variant: tells apart states of one prompt under different weights (LoRA sets).
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if (variant, prompt) not in self._states]
        fresh = dict(zip(missing, self._run(missing), strict=True)) if missing else {}
        states = [fresh.get(prompt) or self._states[variant, prompt] for prompt in prompts]
        for prompt, state in zip(prompts, states, strict=True):
            self._states[variant, prompt] = state
            self._states.move_to_end((variant, prompt))
        while len(self._states) > CACHED_PROMPTS:
            self._states.popitem(last=False)
        return states

    def reader(self) -> Callable[[str], bool]:
        """Tells whether all of a prompt is read. It has tokenizers of its own: these are not made for two threads."""
        towers = [Tower(copy.deepcopy(tower.tokenizer), None) for tower in self.towers]
        return lambda prompt: not any(tower.unread([prompt])[0] for tower in towers)

    @torch.no_grad()
    def _run(self, prompts: Sequence[str]) -> list[TextStates]:
        unread = [max(counts) for counts in zip(*(tower.unread(prompts) for tower in self.towers), strict=True)]
        if len(self.towers) == 1:
            hidden = self.towers[0](prompts, hidden_states=False)[0]
            # Cloned: a view would keep the whole batch alive.
            return [TextStates(row.clone(), None, count) for row, count in zip(hidden, unread, strict=True)]
        outputs = [tower(prompts, hidden_states=True) for tower in self.towers]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        return [
            TextStates(row.clone(), vector.clone(), count)
            for row, vector, count in zip(hidden, pooled, unread, strict=True)
        ]


def load_text(folder: Folder, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """Load the folder's text encoders and tokenizers."""
    suffixes = ("", "_2") if folder.pipeline == "StableDiffusionXLPipeline" else ("",)
    return TextEncoder([_load_tower(folder, suffix, device, dtype) for suffix in suffixes])


def _load_tower(folder: Folder, suffix: str, device: torch.device, dtype: torch.dtype) -> Tower:
    import transformers

    name = f"text_encoder{suffix}"
    cls = getattr(transformers, folder.component(name, ENCODERS))
    encoder = load_module(cls, folder.path / name, dtype, dtype_argument="dtype")
    name = f"tokenizer{suffix}"
    cls = getattr(transformers, folder.component(name, TOKENIZERS))
    path = folder.path / name
    if not any(all((path / file).is_file() for file in files) for files in VOCABULARIES):
        raise ModelError(f"{path} holds no vocabulary: looked for {' or '.join(' and '.join(f) for f in VOCABULARIES)}")
    try:
        with quiet_libraries():
            tokenizer = cls.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{path} holds no {cls.__name__}: {one_line(error)}") from error
    size, vocabulary = encoder.config.vocab_size, len(tokenizer)
    if vocabulary > size:
        raise ModelError(f"{path} has {vocabulary} tokens, its text encoder only {size}")
    positions = encoder.config.max_position_embeddings
    if tokenizer.model_max_length > positions:
        raise ModelError(
            f"{path / 'tokenizer_config.json'}: model_max_length {tokenizer.model_max_length} "
            f"is more than the text encoder's {positions} positions"
        )
    return Tower(tokenizer, encoder.to(device))
