"""A rewrite is a caption that keeps the prompt's subjects, or the prompt itself and the reason; it never raises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.rewriter.subjects import Vocabulary
from models.rewriter.template import MAX_TOKENS, Message
from models.training.captions import describe
from models.training.concepts import load_concepts
from models.training.rewriter.pairs import PairWriter
from models.training.rewriter.scenes import scenes_of
from service.errors import BusyError
from service.llm.rewrite import Rewrite, Rewriter

WORDS = {"stapler", "theory", "hat", "with", "bouncing"}
VOCABULARY = Vocabulary(load_concepts(), WORDS.__contains__)


class Fake:
    """A language model with an answer for every prompt, in pieces; counts requests not read to the end."""

    def __init__(self, *pieces: str, error: Exception | None = None, hangs: bool = False) -> None:
        self.pieces, self.error, self.hangs = pieces, error, hangs
        self.asked: list[Sequence[Message]] = []
        self.live = self.cancelled = 0

    async def answer(self, messages: Sequence[Message], max_tokens: int) -> AsyncGenerator[str, None]:
        assert max_tokens == MAX_TOKENS
        self.asked.append(messages)
        self.live += 1
        ended = False
        try:
            for piece in self.pieces:
                await asyncio.sleep(0)
                yield piece
            if self.error is not None:
                raise self.error
            if self.hangs:
                await asyncio.Event().wait()
            ended = True
        finally:
            self.live -= 1
            self.cancelled += not ended


def rewrite(
    model: Fake, prompt: str, fits: Callable[[str], bool] = lambda caption: True, budget_s: float = 60
) -> Rewrite:
    result = asyncio.run(Rewriter(model, VOCABULARY, fits, budget_s).rewrite(prompt))
    assert result.original == prompt
    assert (result.prompt == prompt) == (result.outcome != "rewritten")
    assert (result.reason == "") == (result.outcome in ("rewritten", "unchanged"))
    assert model.live == 0
    return result


def test_a_caption_stands_for_its_prompt() -> None:
    model = Fake("a b", "lue ", "cat on", " a hat")
    result = rewrite(model, "kitty n a hat pls, bluish")
    assert (result.prompt, result.outcome, model.cancelled) == ("a blue cat on a hat", "rewritten", 0)
    assert model.asked[0][-1] == {"role": "user", "content": "kitty n a hat pls, bluish"}


def test_the_first_line_ends_the_request() -> None:
    model = Fake("\n", "a cat", "\nand so on", hangs=True)
    assert rewrite(model, "kitty").prompt == "a cat"
    assert model.cancelled == 1


def test_an_answer_without_end_is_cut_off_and_refused() -> None:
    model = Fake(*["very "] * 1000)
    assert rewrite(model, "kitty").reason == "the caption has lost 'kitty'"
    assert model.cancelled == 1


@pytest.mark.parametrize("prompt", ["a cat", "  A  cat "])
def test_what_is_clean_stays(prompt: str) -> None:
    assert rewrite(Fake("a cat"), prompt).outcome == "unchanged"


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("a puppy and a kitty", "a dog and a cat"),
        ("pls draw appel thx", "an apple"),
        ("2 tomatos", "two tomatoes"),
        ("a stapler", "a paperclip"),  # perhaps: no table knows what a stapler is
        ("a bouncing moggy with a hat", "a cat with a top hat"),
        ("i would like a boat at sea", "a ship by the sea"),
        ("small red heart", "a small red heart on a white background"),
        ("an orange car", "an orange car"),
        ("cat under the stars", "a cat at night"),
    ],
)
def test_subjects_may_have_other_words(prompt: str, caption: str) -> None:
    assert rewrite(Fake(caption), prompt).outcome in ("rewritten", "unchanged")


@pytest.mark.parametrize(
    ("prompt", "caption", "reason"),
    [
        ("a dog and a kitty", "a dog", "the caption has lost 'kitty'"),
        ("an appel and a dog", "a dog", "the caption has lost 'apple'"),
        ("a hot dog", "a dog", "the caption has lost 'hot dog'"),
        ("two red cars", "two red cars and a whale", "the caption has made up 'whale'"),
        ("two red cars", "", "the caption is empty"),
        ("two red cars", '""\n', "the caption is empty"),
    ],
)
def test_what_is_lost_or_made_up_is_refused(prompt: str, caption: str, reason: str) -> None:
    result = rewrite(Fake(caption), prompt)
    assert (result.outcome, result.reason) == ("guarded", reason)


def test_what_the_image_model_would_not_read_is_refused() -> None:
    result = rewrite(Fake("a cat and a dog"), "cat, dog", lambda caption: len(caption) < 10)
    assert (result.outcome, result.reason) == ("guarded", "the caption is longer than the image model reads")


def test_guards_let_right_captions_pass_and_notice_lost_subjects() -> None:
    """Of the recipe's own pairs, whose captions are right; and without one of two things."""
    concepts = load_concepts()
    vocabulary = Vocabulary(concepts)
    pairs = PairWriter(concepts, lambda caption: True).write("guards", 400, ["grammar", "clutter"])
    halves = [replace(pair.meaning, things=pair.meaning.things[:1]) for pair in pairs if pair.meaning is not None]
    captions = describe(scenes_of(halves), concepts)

    def refused(prompt: str, caption: str) -> bool:
        rewriter = Rewriter(Fake(caption), vocabulary, lambda caption: True, 60)
        return asyncio.run(rewriter.rewrite(prompt)).outcome == "guarded"

    right = [refused(pair.prompt, pair.caption) for pair in pairs]
    lost = [
        refused(pair.prompt, caption)
        for pair, caption in zip(pairs, captions, strict=True)
        if pair.meaning is not None and len(pair.meaning.things) == 2
    ]
    assert sum(right) <= 0.02 * len(right)
    assert sum(lost) >= 0.8 * len(lost) > 0


def test_no_longer_than_the_budget() -> None:
    model = Fake("a ca", hangs=True)
    result = rewrite(model, "kitty", budget_s=0.05)
    assert (result.outcome, result.reason, model.cancelled) == ("timed_out", "no caption within 0.05 s", 1)
    assert 0.05 <= result.seconds < 5


def test_errors_of_the_engine_are_told() -> None:
    result = rewrite(Fake("a ca", error=BusyError("the queue is full", retry_after=1)), "kitty")
    assert (result.outcome, result.reason) == ("failed", "the queue is full")


def test_faults_are_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    result = rewrite(Fake(error=RuntimeError("secret")), "kitty")
    assert (result.outcome, result.reason) == ("failed", "the language model failed")
    assert "secret" in caplog.text


def test_cancelling_cancels_the_request() -> None:
    model = Fake(hangs=True)

    async def leave() -> None:
        task = asyncio.create_task(Rewriter(model, VOCABULARY, lambda caption: True, 60).rewrite("kitty"))
        await asyncio.sleep(0.01)
        assert model.live == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert (model.live, model.cancelled) == (0, 1)


def test_rewrites_do_not_wait_for_one_another() -> None:
    slow, quick = Fake(hangs=True), Fake("a cat")

    async def both() -> list[Rewrite]:
        rewriters = [Rewriter(model, VOCABULARY, lambda caption: True, 0.2) for model in (slow, quick)]
        return await asyncio.gather(*(rewriter.rewrite("kitty") for rewriter in rewriters))

    first, second = asyncio.run(both())
    assert (first.outcome, second.outcome) == ("timed_out", "rewritten")
    assert second.seconds < first.seconds


@given(prompt=st.text(min_size=1), answer=st.text())
def test_whatever_is_asked_and_answered(prompt: str, answer: str) -> None:
    result = rewrite(Fake(answer), prompt)
    assert result.prompt
    assert "\n" not in result.prompt or result.prompt == prompt
