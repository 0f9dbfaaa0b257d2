"""The tiny model, loaded once, and transformers' own of the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from models.llm.loading import LanguageModel, load_llm
from tests.service.llm import tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_llm(str(tiny_folder), dtype="float32", device="cpu", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def reference(tiny_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_folder).eval()
