"""Prompts to embeddings without the image tower."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.errors import ModelError
from models.scorer import embedder as module
from models.scorer import load_scorer
from models.scorer.embedder import Embedder, load_embedder
from tests.models.scorer.small import SIZES, parts

PROMPTS = ["a red apple", "a cat on a blue background and a tiny dog", "", "a red apple", "two dogs"]


def test_it_embeds_as_the_scorer_does(folder: Path) -> None:
    embedder = load_embedder(*parts(folder))
    rows = embedder.embed(PROMPTS)
    assert rows.dtype == np.float32
    assert rows.shape == (len(PROMPTS), SIZES.embed) == (5, embedder.dimension)
    expected = load_scorer(*parts(folder), "cpu").embed_text(PROMPTS).numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert embedder.embed([]).shape == (0, SIZES.embed)


def test_without_a_scorer_it_is_the_mean_of_the_text_encoders_states(folder: Path) -> None:
    _, encoder, tokenizer = parts(folder)
    plain = load_embedder(None, encoder, tokenizer)
    rows = plain.embed(["a red apple"])
    assert rows.shape == (1, plain.dimension) == (1, SIZES.text_width)
    bert, tokenize = module.load_encoder(encoder, tokenizer)
    states = bert(tokenize(["a red apple"])).last_hidden_state[0]  # alone, a prompt has no padding
    expected = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
    np.testing.assert_allclose(rows[0], expected, atol=1e-6)


@pytest.fixture
def counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Embedder, list[str]]:
    """An embedder, and the prompts that it has run."""
    embedder, run = load_embedder(*parts(folder)), []
    inner: Callable[..., list[np.ndarray]] = embedder._run

    def running(prompts: list[str]) -> list[np.ndarray]:
        run.extend(prompts)
        return inner(prompts)

    monkeypatch.setattr(embedder, "_run", running)
    return embedder, run


def test_a_prompt_that_is_remembered_is_not_run_again(
    counted: tuple[Embedder, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 2)
    embedder, run = counted
    first = embedder.embed(["a cat", "a dog", "a cat"])
    assert run == ["a cat", "a dog"]
    np.testing.assert_array_equal(first[0], first[2])
    again = embedder.embed(["a cat"])
    again[:] = 0  # what a caller does with an answer is its own affair
    np.testing.assert_array_equal(embedder.embed(["a cat"]), first[:1])
    assert run == ["a cat", "a dog"]
    embedder.embed(["a fox"])  # the dog is the one not asked for lately
    embedder.embed(["a cat", "a fox"])
    assert run == ["a cat", "a dog", "a fox"]
    embedder.embed(["a dog"])
    assert run[3:] == ["a dog"]


def test_a_prompt_is_remembered_for_its_owner_alone(counted: tuple[Embedder, list[str]]) -> None:
    embedder, run = counted
    ada = embedder.embed(["a cat"], "ada")
    np.testing.assert_array_equal(embedder.embed(["a cat"], "bob"), ada)
    assert run == ["a cat", "a cat"]
    embedder.embed(["a cat"], "ada")
    assert run == ["a cat", "a cat"]


def test_threads_share_it(counted: tuple[Embedder, list[str]]) -> None:
    embedder, run = counted
    prompts = [f"a {word} {thing}" for word in ("red", "blue") for thing in ("cat", "dog", "fox")]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: embedder.embed([prompts[i % 6]])[0], range(60)))
    assert sorted(run) == sorted(prompts)
    for i, answer in enumerate(answers):
        np.testing.assert_array_equal(answer, answers[i % 6])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "model.safetensors is missing"),
        ({"scale": torch.zeros(1)}, "damaged or cut short"),
        ({"projection.weight": torch.zeros(8, 48)}, r"trained on text states of width 48; .* gives 32"),
    ],
)
def test_a_scorer_that_does_not_fit_is_one_line(
    folder: Path, tmp_path: Path, weights: dict[str, torch.Tensor] | None, message: str
) -> None:
    if weights is not None:
        save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        load_embedder(tmp_path, *parts(folder)[1:])
    assert "\n" not in str(caught.value)


def test_it_is_loaded_without_open_clip() -> None:
    check = "import sys, models.scorer.embedder; assert 'open_clip' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[3])
