"""Prompts become the states that the stock pipelines compute, in batches and only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models.diffusion.folder import quiet_libraries, read_folder
from models.diffusion.loading import load_model
from models.diffusion.text import CACHED_PROMPTS, TextEncoder, load_text
from tests import tiny
from tests.models.diffusion.test_equivalence import stock

PROMPTS = ["a red apple", "", "two tiny foxes on a blue background"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bundle(tmp_path_factory.mktemp("bundle") / "model")


def encoder(folder: Path) -> TextEncoder:
    return load_text(read_folder(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("build", [tiny.sd, tiny.sd2, tiny.bundle])
def test_same_states_as_stable_diffusion(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    folder = build(tmp_path / "model")
    expected, _ = stock(folder, "StableDiffusionPipeline").encode_prompt(PROMPTS, "cpu", 1, False)
    states = encoder(folder).encode(PROMPTS)
    torch.testing.assert_close(torch.stack([state.hidden for state in states]), expected)
    assert all(state.pooled is None for state in states)


def test_same_states_as_sdxl(tmp_path: Path) -> None:
    folder = tiny.sdxl(tmp_path / "model")
    hidden, _, pooled, _ = stock(folder, "StableDiffusionXLPipeline").encode_prompt(
        PROMPTS, device="cpu", do_classifier_free_guidance=False
    )
    states = encoder(folder).encode(PROMPTS)
    torch.testing.assert_close(torch.stack([state.hidden for state in states]), hidden)
    torch.testing.assert_close(torch.stack([state.pooled for state in states if state.pooled is not None]), pooled)


def test_padding_does_not_act_where_there_is_a_mask(folder: Path) -> None:
    """The bundle's encoder masks its padding: the words' states do not depend on the padded length."""
    text = encoder(folder)
    (tower,) = text.towers
    (long,) = text.encode(["a cat"])
    tower.tokenizer.model_max_length = 8
    (short,) = text.encode(["a cat"], variant="shorter")
    torch.testing.assert_close(long.hidden[:4], short.hidden[:4])


def test_prompts_are_encoded_once_and_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = encoder(folder)
    batches: list[list[str]] = []
    run = text._run

    def counted(prompts: list[str]) -> object:
        batches.append(list(prompts))
        return run(prompts)

    monkeypatch.setattr(text, "_run", counted)
    first = text.encode(["a cat", "", "a cat"])
    assert first[0] is first[2]
    again = text.encode(["", "a dog"])
    assert again[0] is first[1]
    assert batches == [["a cat", ""], ["a dog"]]


def test_memory_of_prompts_is_bounded(folder: Path) -> None:
    text = encoder(folder)
    for start in range(0, CACHED_PROMPTS + 60, 40):
        text.encode([f"a cat {number}" for number in range(start, start + 40)])
    assert len(text._states) == CACHED_PROMPTS
    kept, (last,) = list(text._states.values()), text.encode(["a cat 300"])
    assert any(last is state for state in kept)


def test_more_new_prompts_than_are_remembered(folder: Path) -> None:
    prompts = [f"a dog {number}" for number in range(CACHED_PROMPTS + 5)]
    assert len(encoder(folder).encode(prompts)) == len(prompts)


def test_truncation_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = encoder(folder).encode(["a cat", "a cat " * 20])
    assert [state.unread for state in states] == [0, 42 - tiny.BERT_LENGTH]
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("scale", "sampler", "guided"), [(1.0, "ddim", False), (1.01, "ddim", True), (8.0, "lcm", False)]
)
def test_negative_is_encoded_only_where_it_acts(folder: Path, scale: float, sampler: str, guided: bool) -> None:
    model = load_model(str(folder), dtype="float32", device="cpu", cache_dir=folder)
    (condition,) = model.encode([("a cat", "a dog")], [scale], sampler, (64, 64))
    assert (condition.negative is not None) == guided
    assert condition.evaluations == (2 if guided else 1)


def test_mixed_batch_keeps_negatives_with_their_rows(folder: Path) -> None:
    model = load_model(str(folder), dtype="float32", device="cpu", cache_dir=folder)
    pairs = [("a cat", "red"), ("a dog", "green"), ("a fox", "blue")]
    conditions = model.encode(pairs, [3.0, 1.0, 5.0], "ddim", (64, 64))
    for (prompt, negative), condition in zip(pairs, conditions, strict=True):
        (alone,) = model.encode([(prompt, negative)], [condition.guidance_scale], "ddim", (64, 64))
        assert alone.positive is condition.positive
        assert alone.negative is condition.negative
