"""Captions say what the scene shows, in English, as the tokenizer would read them, and never in unseen words."""

import re
from dataclasses import replace

import pytest
import torch

from models.training import wordings
from models.training.captions import CaptionWriter, describe, vocabulary
from models.training.concepts import COLOUR_NAMES, COLOUR_WORDS, STYLES, TINTS, load_concepts, select
from models.training.grounds import COLOURED, GROUNDS
from models.training.layouts import LARGE, RELATIONS, SMALL
from models.training.scenes import Scenes, Stage
from models.training.sprites import draw_shapes
from models.training.text import LENGTH, TextTower, tiny_tower

CPU = torch.device("cpu")
CONCEPTS = select(("cat", "apple", "cherries", "umbrella", "fish", "dog"))
NAMES = [concept.name for concept in CONCEPTS]
DEFAULTS = {
    "count": [1, 0], "tint": [0, 0], "size": [0, 0], "relation": 0, "style": 0, "ground": 0, "top": 0, "bottom": 0,
    "styled": False, "named": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tower() -> TextTower:
    draft = CaptionWriter(CONCEPTS, tiny_tower(["a"], CPU))
    return tiny_tower(vocabulary(CONCEPTS, draft.phrases), CPU)


@pytest.fixture(scope="module")
def writer(tower: TextTower) -> CaptionWriter:
    return CaptionWriter(CONCEPTS, tower)


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(draw_shapes(CONCEPTS, 16), CONCEPTS, CPU)


def scene(*names: str, repeat: int = 1, **fields: object) -> Scenes:
    """`repeat` times the same scene of one concept or two; two stand alone unless counted."""
    first = NAMES.index(names[0])
    meaning = DEFAULTS | {"concept": [first, NAMES.index(names[-1])], "count": [1, len(names) - 1]} | fields
    tensors = {name: torch.tensor([value] * repeat) for name, value in meaning.items()}
    five = torch.zeros(repeat, 5)
    return Scenes(
        **tensors, drawing=five.long(), place=torch.zeros(repeat, 5, 3), turn=five, mirror=five.bool(),
        group=five.long(),
    )  # fmt: skip


def captions(writer: CaptionWriter, scenes: Scenes) -> list[str]:
    torch.manual_seed(1)
    return writer.texts(writer.slots(scenes))


@pytest.mark.parametrize("seed", range(2))
def test_tokens_are_those_of_the_text(writer: CaptionWriter, tower: TextTower, stage: Stage, seed: int) -> None:
    torch.manual_seed(seed)
    slots = writer.slots(stage.sample(300))
    ids = writer.tokens(slots)
    assert ids.shape == (300, LENGTH)
    assert torch.equal(ids, tower.tokens(writer.texts(slots)))
    assert (ids[:, 0] == tower.start).all()
    assert tower.tokenizer.token_to_id("[UNK]") not in ids


def test_a_caption_too_long_is_cut_as_the_tokenizer_cuts(writer: CaptionWriter, tower: TextTower) -> None:
    slots = torch.full((1, 40), writer.phrases.texts.index("a picture of"))
    assert torch.equal(writer.tokens(slots), tower.tokens(writer.texts(slots)))


def test_long_wordings_give_way_to_shorter_ones(writer: CaptionWriter, tower: TextTower) -> None:
    """Of a crowded scene single drafts are too long now and then; captions are not."""
    scenes = scene(
        "cat", "umbrella", repeat=400, count=[2, 3], tint=[8, 8], size=[SMALL, LARGE], relation=1, styled=True,
        named=True, ground=GROUNDS.index("gradient"), top=COLOUR_NAMES.index("sky blue"), style=2,
    )  # fmt: skip
    torch.manual_seed(0)
    drafts, captions = ([len(tower.pieces(text)) for text in writer.texts(slots)]
                        for slots in (writer.draft(scenes), writer.slots(scenes)))  # fmt: skip
    assert max(drafts) == LENGTH
    assert max(captions) <= LENGTH - 2


def test_wordings_vary(writer: CaptionWriter, stage: Stage) -> None:
    torch.manual_seed(0)
    texts = writer.texts(writer.slots(stage.sample(400)))
    assert len(set(texts)) > 380
    words = [len(text.split()) for text in texts]
    assert min(words) <= 3
    assert max(words) >= 18


def test_unseen_words_are_never_written(writer: CaptionWriter, stage: Stage) -> None:
    slots = writer.slots(stage.sample(600))
    assert not torch.isin(slots, torch.tensor(sorted(writer.phrases.unseen))).any()
    kept_out = [word for concept in CONCEPTS for word in concept.unseen]
    assert kept_out
    for text in writer.texts(slots):
        assert not any(re.search(rf"\b{re.escape(word)}\b", text) for word in kept_out), text


def test_unseen_wordings_are_written_on_demand(tower: TextTower, stage: Stage) -> None:
    writer = CaptionWriter(CONCEPTS, tower, unseen=True)
    slots = writer.slots(stage.sample(300))
    assert torch.isin(slots, torch.tensor(sorted(writer.phrases.unseen))).any(1).float().mean() > 0.5


def test_a_style_is_named_if_and_only_if_styled(writer: CaptionWriter, stage: Stage) -> None:
    words = [[word.removeprefix("*") for _, word, *_ in wordings.STYLE_WORDS[style]] for style in STYLES]
    scenes = stage.sample(300)
    for text, style, styled in zip(
        captions(writer, scenes), scenes.style.tolist(), scenes.styled.tolist(), strict=True
    ):
        said = {s for s in range(len(STYLES)) if any(re.search(rf"\b{word}\b", text) for word in words[s])}
        assert said == ({style} if styled else set()), text


@pytest.mark.parametrize("ground", GROUNDS)
def test_a_background_is_named_if_and_only_if_named(writer: CaptionWriter, ground: str) -> None:
    top, bottom = COLOUR_NAMES.index("navy"), COLOUR_NAMES.index("mint")
    meaning = {"repeat": 100, "ground": GROUNDS.index(ground), "top": top, "bottom": bottom}
    tables = (wordings.GROUND, wordings.TELEGRAM_GROUND, wordings.FRONT_GROUND)
    options = [
        text.replace("{a}", "a").strip(" ,") for table in tables for _, *texts in table[ground] for text in texts
    ]
    for text in captions(writer, scene("cat", **meaning, named=True)):
        assert any(part in text for part in options if part), text
        navy = any(word in text for word in ("navy", *COLOUR_WORDS["navy"]))
        mint = any(word in text for word in ("mint", *COLOUR_WORDS["mint"]))
        coloured = GROUNDS.index(ground) < COLOURED
        assert (navy, mint) == (coloured, coloured and ground != "plain"), text
    for text in captions(writer, scene("cat", **meaning)):
        assert "navy" not in text
        assert len(text.split()) <= 9, text  # an opening, a cat, and what may be said of it


CONVERSE = {"left of": "right of", "above": "below", "behind": "in front of", "on": "under"}
CONVERSE |= {there: back for back, there in CONVERSE.items()}


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_told_from_either_side(writer: CaptionWriter, relation: str) -> None:
    backwards = 0
    for text in captions(writer, scene("apple", "umbrella", repeat=150, relation=RELATIONS.index(relation))):
        first = re.search("apple|red delicious", text)
        second = re.search("umbrella|parasol", text)
        assert first is not None
        assert second is not None
        told = relation if first.start() < second.start() else CONVERSE[relation]
        backwards += told != relation
        middle = text[min(first.end(), second.end()) : max(first.start(), second.start())]
        tables = (wordings.AFTER_VERB, wordings.BETWEEN, wordings.TELEGRAM_BETWEEN)
        phrases = [option[1].removesuffix(" ,") for table in tables for option in table[told]]
        assert any(phrase in middle for phrase in phrases), text
    assert (15 < backwards < 75) if relation != "and" else backwards == 0


def test_counts_sizes_and_tints_are_said(writer: CaptionWriter) -> None:
    scenes = scene("cat", repeat=300, count=[3, 0], tint=[1 + TINTS.index("blue"), 0], size=[LARGE, 0])
    for text in captions(writer, scenes):
        assert re.search(r"\b(three|3|trio)\b", text), text
        assert re.search(r"\b(large|big|huge|giant)\b", text), text
        assert "blue" in text
        assert re.search(r"\b(cats|kitties|kittens|tomcats|tabbies|tabby cats|pussycats)\b", text), text


def test_grammar(writer: CaptionWriter, stage: Stage) -> None:
    texts = captions(writer, stage.sample(600))
    for text in texts:
        assert not re.search(r"\ba [aeio]", text), text
        assert not re.search(r"\ban [^aeiou]", text), text
        assert not re.search(r"\b(a|an|one) (cherries|apples|cats|umbrellas|dogs)\b", text), text
        assert not re.search(r"\b(two|three|four|five|[2-5]) (cat|apple|umbrella|dog)\b", text), text
        assert not re.search(r"there is (two|three|four|five)|there are (an|one) ", text), text
        assert not re.search(r"\b(pair|couple|group|trio) of \w+ ?cherries", text), text
        assert "  " not in text
        assert not text.startswith((",", " "))


def test_describe_is_plain() -> None:
    blue = 1 + TINTS.index("blue")
    night, dots = GROUNDS.index("night"), GROUNDS.index("dots")
    red, white = COLOUR_NAMES.index("red"), COLOUR_NAMES.index("white")
    scenes = Scenes.cat(
        [
            scene("apple", size=[SMALL, 0], tint=[blue, 0], styled=True, style=1, named=True, ground=night),
            scene("cat", "apple", count=[2, 1], relation=1, named=True, top=red, bottom=red),
            scene("cherries", named=True, ground=dots, top=red, bottom=white),
            scene("umbrella", "dog", relation=RELATIONS.index("behind")),
        ]
    )
    assert describe(scenes, CONCEPTS) == [
        "a small blue apple at night, flat style",
        "two cats to the left of an apple on a red background",
        "cherries on a red background with white dots",
        "an umbrella behind a dog",
    ]
    assert describe(scenes[:1], CONCEPTS, ["orb"]) == ["a small blue orb at night, flat style"]


def test_an_own_colour_never_names_another_concept(tower: TextTower) -> None:
    cat, other = replace(CONCEPTS[0], colours=("black",), synonyms=()), replace(CONCEPTS[1], name="black cat")
    for concepts, said in (((cat,), True), ((cat, other), False)):
        texts = captions(CaptionWriter(concepts, tower), scene("cat", repeat=300))
        assert any("black" in text for text in texts) is said


def test_no_trained_word_of_one_concept_is_unseen_for_another() -> None:
    trained = {word for concept in load_concepts() for word in (concept.name, *concept.synonyms)}
    assert trained.isdisjoint(word for concept in load_concepts() for word in concept.unseen)
