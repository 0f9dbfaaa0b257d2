from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.llm import small


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied Llama in transformers' format."""
    return small.llama(tmp_path_factory.mktemp("llm") / "tiny-llama", tie_word_embeddings=True)
