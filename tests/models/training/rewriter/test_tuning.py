"""Packed conversations do not see one another; tuning lowers the loss and resumes; peft reads what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.llm.lora import Lora
from models.rewriter.subjects import Vocabulary
from models.rewriter.template import messages
from models.training.concepts import select
from models.training.rewriter import adapter, run
from models.training.rewriter.base import tiny_base
from models.training.rewriter.facts import facts_of, figures, score
from models.training.rewriter.packing import IGNORED, Chat, Row, Rows, collate, sees
from models.training.rewriter.pairs import Pair, PairWriter
from models.training.rewriter.scenes import Meaning, Thing
from models.training.rewriter.tune import FULL, MINIATURE, Tuning, answer, rate_at
from tests.models.training.small import Ticking

CONCEPTS = select(("cat", "apple", "orange", "dog", "umbrella"))
WRITER = PairWriter(CONCEPTS, lambda caption: True)
VOCABULARY = Vocabulary(CONCEPTS)
LENGTH = MINIATURE.length
Base = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]


@pytest.fixture
def base() -> Base:
    texts = [text for pair in WRITER.write("words", 200) for text in (pair.prompt, pair.caption)]
    return tiny_base([message["content"] for message in messages("")] + texts)


def rows(base: Base, seed: int = 0) -> Rows:
    return Rows(WRITER, Chat(base[1]), LENGTH, seed)


def test_the_parts_of_a_conversation_are_its_tokens(base: Base) -> None:
    """Encoded apart, as the prefix cache wants it, they are what the tokenizer makes of the whole."""
    tokenizer, chat = base[1], Chat(base[1])
    for pair in WRITER.write("parts", 20):
        turns = [*messages(pair.prompt), {"role": "assistant", "content": pair.caption}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
        ids = chat.shared + chat.asked(pair.prompt) + chat.answered(pair.caption)
        assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_rows_hold_whole_conversations(base: Base) -> None:
    tokenizer, chat = base[1], Chat(base[1])
    row = rows(base)[3]
    again = rows(base)[3]
    assert all(torch.equal(getattr(row, name), getattr(again, name)) for name in Row.__slots__)
    assert row.tokens.shape == row.positions.shape == row.part.shape == row.targets.shape == (LENGTH,)
    assert row.tokens[: len(chat.shared)].tolist() == chat.shared
    assert (row.targets[: len(chat.shared)] == IGNORED).all()
    pairs = WRITER.write("0 3 0", 24)
    assert int(row.part.max()) >= 2
    for number in range(1, int(row.part.max()) + 1):
        own = row.part == number
        targets = row.targets[own]
        answer = targets[targets != IGNORED].tolist()
        asked = chat.asked(pairs[number - 1].prompt)
        assert answer == chat.answered(pairs[number - 1].caption)
        assert answer[-1] == tokenizer.eos_token_id
        assert row.tokens[own].tolist() == asked + answer
        assert targets[len(asked) - 1] == answer[0]  # said after the last token of the question
        assert row.positions[own].tolist() == list(range(len(chat.shared), len(chat.shared) + int(own.sum())))


def test_packed_conversations_read_as_if_alone(base: Base) -> None:
    model = base[0]
    row = rows(base)[0]
    batch = collate([row])
    with torch.no_grad():
        packed = model(
            input_ids=batch.tokens, attention_mask=sees(batch.part), position_ids=batch.positions, use_cache=False
        ).logits[0]
        for number in (1, int(row.part.max())):
            kept = (row.part == 0) | (row.part == number)
            alone = model(input_ids=row.tokens[kept][None], use_cache=False).logits[0]
            torch.testing.assert_close(packed[row.part == number], alone[row.part[kept] == number])


def tuning(base: Base, folder: Path, steps: int) -> tuple[Tuning, float]:
    """Tuned by a clock that tells a second a reading: about two a step. Returns the budget too."""
    one = Tuning(base[0], MINIATURE, folder / "progress.pt", 0, Ticking())
    return one, 2.0 * steps


def test_tuning_lowers_the_loss(base: Base, tmp_path: Path) -> None:
    one, budget = tuning(base, tmp_path, 41)
    frozen = {
        name: value.clone() for name, value in base[0].state_dict().items() if ".a" not in name and ".b" not in name
    }
    one.run(rows(base), budget, lambda text: None)
    assert one.step >= 40
    assert one.losses[-1] < one.losses[0] - 0.15
    after = base[0].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())


def test_tuning_goes_on_where_it_was(base: Base, tmp_path: Path) -> None:
    one, budget = tuning(base, tmp_path, 4)
    one.run(rows(base), budget, lambda text: None)
    seen: list[int] = []

    class Watched(Rows):
        def __getitem__(self, index: int) -> Row:
            seen.append(index)
            return super().__getitem__(index)

    assert one.step > 0
    again = Tuning(base_like(base), MINIATURE, tmp_path / "progress.pt", 1, Ticking())
    assert (again.step, again.seconds) == (one.step, one.seconds)
    own, kept = adapter.weights(again.adapters), adapter.weights(one.adapters)
    assert all(torch.equal(own[name], kept[name]) for name in kept)
    again.run(Watched(WRITER, Chat(base[1]), LENGTH, 0), budget + 4, lambda text: None)
    assert seen[0] == one.step * MINIATURE.batch
    assert again.step > one.step


def base_like(base: Base) -> LlamaForCausalLM:
    """A model of the same sizes, without adapters."""
    return LlamaForCausalLM(base[0].config).eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_the_adapter_is_what_peft_reads(base: Base, tmp_path: Path) -> None:
    model, tokenizer = base
    plain = base_like(base)
    plain.load_state_dict(model.state_dict())
    adapters = adapter.adapt(model, 4, 8)
    for one in adapters.values():
        torch.nn.init.normal_(one.b, std=0.2)
    path = adapter.save(adapters, tmp_path, "base")
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    ids = torch.tensor([Chat(tokenizer).shared[:40]])
    with torch.no_grad():
        wanted, untuned = model(ids).logits, plain(ids).logits
        found = PeftModel.from_pretrained(plain, str(tmp_path)).eval()(ids).logits
    assert float((wanted - untuned).abs().max()) > 0.1
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)
    name = next(iter(adapters))
    merged = Lora(tmp_path).merged(f"{name}.weight", adapters[name].base.weight)
    update = adapters[name].scale * adapters[name].b @ adapters[name].a
    torch.testing.assert_close(merged - adapters[name].base.weight, update, atol=0.01, rtol=0.01)


def test_the_full_adapter_is_small_enough() -> None:
    """Of SmolLM2-135M's shapes: 30 layers of width 576, 192 of keys and values, 1536 inside, in float16."""
    a_rank = 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert 2 * FULL.rank * a_rank <= 16 * 2**20 - 100_000


def test_answers_end_and_are_captions(base: Base) -> None:
    captions = answer(base[0], base[1], Chat(base[1]), ["a cat", "two big apples pls", ""])
    assert len(captions) == 3
    assert all("\n" not in caption for caption in captions)


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [rate_at(i / 100) for i in range(101)]
    assert 0 < rates[0] < 0.1
    assert max(rates) == rates[3] == 1
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == 0


@pytest.mark.parametrize(
    ("caption", "facts"),
    [
        ("two small red apples on a sky blue background, flat style",
         {("subject", "apple"), ("count", "apple", "2"), ("size", "apple", "small"), ("colour", "apple", "red"),
          ("ground", "plain", "sky blue"), ("style", "flat")}),
        ("a cat to the left of an orange dog at night",
         {("subject", "cat"), ("count", "cat", "1"), ("subject", "dog"), ("count", "dog", "1"),
          ("colour", "dog", "orange"), ("relation", "cat", "left of", "dog"), ("ground", "night")}),
        ("an orange on a cat", {("subject", "orange"), ("count", "orange", "1"), ("subject", "cat"),
                                ("count", "cat", "1"), ("relation", "orange", "on", "cat")}),
        ("nothing of it", set()),
    ],
)  # fmt: skip
def test_facts_of_captions(caption: str, facts: set[tuple[str, ...]]) -> None:
    assert facts_of(caption, VOCABULARY) == facts


def test_scores() -> None:
    meaning = Meaning((Thing(0),))
    pairs = [Pair("kitty", "two red cats", "typos", meaning), Pair("jazz", "jazz", "foreign", None)]
    perfect = score(pairs, ["two red cats", "jazz"], VOCABULARY)
    assert (perfect.exact, perfect.subject, perfect.attributes, perfect.invented) == (1, 1, 1, 0)
    half = score(pairs, ["a red cat", "a cat"], VOCABULARY)
    assert (half.exact, half.subject, half.attributes, half.invented) == (0, 0.5, 0.5, 0.5)
    nothing = score(pairs, ["", ""], VOCABULARY)
    assert (nothing.exact, nothing.subject, nothing.attributes, nothing.invented) == (0, 0, 0, 0)
    assert figures(pairs, ["two red cats", ""], VOCABULARY)["kinds"]["foreign"]["subject"] == 0


def test_the_whole_recipe_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--miniature", "--out", str(tmp_path), "--seconds", "1.5"]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["steps"] > 0
    assert found["adapter_bytes"] == (tmp_path / adapter.WEIGHTS).stat().st_size
    assert found["before"]["all"]["n"] == found["after"]["all"]["n"] == 10
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in answers} == {("kind", "prompt", "caption", "before", "after")}
    assert (tmp_path / "heldout.jsonl").exists()
    before = (tmp_path / "before.json").read_bytes()
    assert run.main(["--miniature", "--out", str(tmp_path), "--seconds", "2"]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["steps"] > found["steps"]
    assert (tmp_path / "before.json").read_bytes() == before  # of the untuned model still
    assert "after: " in capsys.readouterr().out
