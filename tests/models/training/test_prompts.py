"""Evaluation's prompts: what the groups hold, and that records and scenes say the same."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from models.training.captions import CaptionWriter, describe, vocabulary
from models.training.concepts import COLOUR_NAMES, STYLES, TINTS, select
from models.training.prompts import (
    HELD_OUT,
    PARAPHRASES,
    PHRASINGS,
    SHEET_PROMPTS,
    SYNONYMS,
    TWINS,
    Record,
    read_records,
    records,
    scenes_of,
    write_records,
)
from models.training.scenes import Stage
from models.training.sprites import draw_shapes
from models.training.text import tiny_tower

CPU = torch.device("cpu")
CONCEPTS = select(("cat", "apple", "cherries", "umbrella", "fish", "dog"))
INDEX = {concept.name: number for number, concept in enumerate(CONCEPTS)}


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(draw_shapes(CONCEPTS, 16), CONCEPTS, CPU)


@pytest.fixture(scope="module")
def writer() -> CaptionWriter:
    draft = CaptionWriter(CONCEPTS, tiny_tower(["a"], CPU))
    return CaptionWriter(CONCEPTS, tiny_tower(vocabulary(CONCEPTS, draft.phrases), CPU), unseen=True)


@pytest.fixture(scope="module")
def made(stage: Stage, writer: CaptionWriter) -> list[Record]:
    return records(stage, writer, seed=3)


def test_groups_have_their_sizes(made: list[Record]) -> None:
    expected = {group: count for group, (_, count) in HELD_OUT.items()}
    expected |= {SYNONYMS: PARAPHRASES, PHRASINGS: PARAPHRASES, TWINS: 2 * PARAPHRASES}
    assert Counter(record["group"] for record in made) == expected
    assert sum(expected.values()) - expected[TWINS] == 1000
    assert len({record["id"] for record in made}) == len(made)
    assert len({record["seed"] for record in made if record["group"] != TWINS}) == 1000


def test_the_seed_decides(made: list[Record], stage: Stage, writer: CaptionWriter) -> None:
    state = torch.get_rng_state()
    assert records(stage, writer, seed=3) == made
    assert torch.equal(torch.get_rng_state(), state)
    assert records(stage, writer, seed=4) != made


def test_records_survive_the_file(made: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "held-out.jsonl"
    write_records(path, made)
    assert read_records(path) == made
    lines = path.read_text().splitlines()
    assert len(lines) == len(made)
    assert json.loads(lines[0])["id"] == "single-000"


def test_every_held_out_group_shows_what_training_never_does(made: list[Record], stage: Stage) -> None:
    for record in made:
        first, *others = record["objects"]
        concept = INDEX[first["concept"]]
        match record["group"]:
            case "single" | "sized" | "counts":
                style, colours = STYLES.index(record["style"] or "3d"), record["background"]["colours"]
                row = stage.held_out_colours[concept, style]
                assert any(row[COLOUR_NAMES.index(colour)] for colour in colours)
            case "recoloured":
                assert stage.held_out_tints[concept, 1 + TINTS.index(first["colour"])]
            case "relations" | "mixed":
                assert stage.held_out_pairs[concept, INDEX[others[0]["concept"]]]
                assert record["relation"] is not None
        assert (record["group"] == "counts") <= (first["count"] > 1)
        assert (record["group"] == "sized") <= (first["size"] is not None)


def test_records_give_the_scenes_their_prompts_describe(made: list[Record], stage: Stage) -> None:
    plain = [record for record in made if record["group"] not in (SYNONYMS, PHRASINGS)]
    assert describe(scenes_of(plain, stage), CONCEPTS) == [record["prompt"] for record in plain]


def test_twins_ask_for_the_same_in_trained_words(made: list[Record], writer: CaptionWriter) -> None:
    by_id = {record["id"]: record for record in made}
    unseen = [word for concept in CONCEPTS for word in concept.unseen]
    phrases = [writer.phrases.texts[number] for number in writer.phrases.unseen]
    for group, kept_out in ((SYNONYMS, unseen), (PHRASINGS, phrases)):
        for record in (record for record in made if record["group"] == group):
            twin = by_id[record["twin"]]
            assert (twin["group"], twin["twin"]) == (TWINS, record["id"])
            for field in ("objects", "relation", "style", "background", "seed"):
                assert twin[field] == record[field]
            assert any(word.strip(" ,") in record["prompt"] for word in kept_out), record["prompt"]
            assert not any(f" {word} " in f" {twin['prompt']} " for word in unseen), twin["prompt"]


def test_what_a_prompt_does_not_say_is_null(made: list[Record], stage: Stage) -> None:
    record = next(record for record in made if record["style"] is None)
    assert "style" not in record["prompt"]
    bare = {**record, "background": None}
    scenes = scenes_of([bare], stage)
    assert not scenes.named.item()
    assert not scenes.styled.item()
    assert COLOUR_NAMES[int(scenes.top)] == "white"
    assert all(r["relation"] is None for r in made if len(r["objects"]) == 1)


def test_concepts_without_unseen_words_are_refused(stage: Stage) -> None:
    silent = CaptionWriter(CONCEPTS, tiny_tower(["a"], CPU))
    with pytest.raises(ValueError, match="the writer uses no unseen wordings"):
        records(stage, silent, seed=0)


def test_the_sheet_has_64_prompts() -> None:
    assert len(set(SHEET_PROMPTS)) == 64
