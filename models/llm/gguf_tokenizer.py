"""The tokenizer that a GGUF file's metadata describes, in the `tokenizers` library's terms.

Two kinds: byte-level BPE ("gpt2": Llama 3, SmolLM) and SentencePiece BPE ("llama": Llama 2, Mistral).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from models.diffusion.folder import one_line
from models.errors import ModelError

CONTROL, USER_DEFINED = 3, 4  # of llama.cpp's token types: those that are matched whole in a text
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
SPACE = "▁"
LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_tokenizer(values: Mapping[str, Any], path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Make a tokenizer and its tokenizer_config.json.

    Args:
        values: the file's metadata.
        path: for messages.

    Raises:
        ModelError: metadata is missing or describes a tokenizer that is not served.
    """
    tokens, model = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.model")
    if not tokens or model not in KINDS:
        raise ModelError(f"{path}: its tokenizer is {model!r}; served are {', '.join(KINDS)}")
    try:
        tokenizer = KINDS[model](values, {token: index for index, token in enumerate(tokens)}, path)
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: its tokenizer cannot be built: {one_line(error)}") from None
    types = values.get("tokenizer.ggml.token_type") or [0] * len(tokens)
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in marked if kind == CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in marked if kind == USER_DEFINED])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in SPECIAL.items():
        index = values.get(f"tokenizer.ggml.{key}")
        if index is not None:
            if not 0 <= index < len(tokens):
                raise ModelError(f"{path}: tokenizer.ggml.{key} is {index}, and there are {len(tokens)} tokens")
            config[f"{name}_token"] = tokens[index]
    if values.get("tokenizer.ggml.add_bos_token", model == "llama") and "bos_token" in config:
        bos = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    if template := values.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return tokenizer, config


def _byte_level(values: Mapping[str, Any], vocabulary: dict[str, int], path: Path) -> Tokenizer:
    merges = values.get("tokenizer.ggml.merges")
    split = values.get("tokenizer.ggml.pre", "default")
    if merges is None:
        raise ModelError(f"{path} lacks tokenizer.ggml.merges")
    if split not in SPLITS:
        raise ModelError(f"{path}: tokenizer.ggml.pre is {split!r}; served are {', '.join(SPLITS)}")
    # Llama 3 takes a word that is in the vocabulary as it is, whatever the merges would make of it.
    tokenizer = Tokenizer(BPE(vocabulary, _pairs(merges, path), ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer = SPLITS[split]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(values: Mapping[str, Any], vocabulary: dict[str, int], path: Path) -> Tokenizer:
    merges = values.get("tokenizer.ggml.merges")
    pairs = _pairs(merges, path) if merges else _pairs_by_score(vocabulary, values["tokenizer.ggml.scores"])
    unknown = values.get("tokenizer.ggml.unknown_token_id")
    token = next((token for token, index in vocabulary.items() if index == unknown), None)
    tokenizer = Tokenizer(BPE(vocabulary, pairs, unk_token=token, fuse_unk=True, byte_fallback=True))
    prefixed = values.get("tokenizer.ggml.add_space_prefix", True)
    spaces = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if prefixed else spaces)
    pieces = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*pieces, decoders.Strip(" ", 1, 0)] if prefixed else pieces)
    return tokenizer


def _pairs(merges: Sequence[str], path: Path) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise ModelError(f"{path}: tokenizer.ggml.merges has {merge!r}, which is not two tokens")
        pairs.append((left, right))
    return pairs


def _pairs_by_score(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges whichever two pieces make the token of the highest score; as a list, best first."""
    pairs = []
    for token, index in vocabulary.items():
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        pairs += [(-scores[index], pair) for pair in known]
    pairs.sort(key=lambda scored: scored[0])  # stable: pairs of one token stay in order
    return [pair for _, pair in pairs]


def _gpt2_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


KINDS = {"gpt2": _byte_level, "llama": _sentence_piece}
SPLITS = {  # how a text is cut into words before merging, by llama.cpp's name for it
    "default": _gpt2_split(),
    "gpt-2": _gpt2_split(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()]),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS + LLAMA3_REST), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
