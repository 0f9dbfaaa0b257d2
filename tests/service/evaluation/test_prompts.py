"""Reading prompts: what is filled in, what is refused and how it is told."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import SetupError
from service.evaluation.metrics import METRICS, check_metrics, parse_metrics
from service.evaluation.prompts import Prompt, check_names, read_prompts, sample
from tests.service.evaluation.standin import Words

FULL: dict[str, Any] = {
    "id": "pair-1",
    "group": "relation pairs",
    "prompt": "two blue apples left of a cat, flat",
    "objects": [
        {"concept": "apple", "count": 2, "colour": "blue", "size": "small"},
        {"concept": "cat", "count": 1, "colour": None, "size": None},
    ],
    "relation": "left of",
    "style": "flat",
    "background": {"ground": "plain", "colours": ["white"]},
    "seed": 7,
    "twin": None,
}


def written(folder: Path, *lines: object, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SetupError) as caught:
        check_names(path, read_prompts(path), Words())
    assert "\n" not in caught.value.message
    return caught.value.message.removeprefix(f"{path}: ")


def test_a_full_record_is_kept_as_it_is(tmp_path: Path) -> None:
    (prompt,) = read_prompts(written(tmp_path, FULL))
    assert prompt == Prompt(1, frozenset(FULL), FULL)


def test_what_a_record_leaves_out_is_filled_in(tmp_path: Path) -> None:
    path = written(tmp_path, "", {"prompt": "an apple", "objects": [{"concept": "apple"}]})
    (prompt,) = read_prompts(path, seed=10)
    assert prompt.given == {"prompt", "objects"}
    assert prompt.record == {
        "id": "2",
        "group": None,
        "prompt": "an apple",
        "objects": [{"concept": "apple", "count": 1, "colour": None, "size": None}],
        "relation": None,
        "style": None,
        "background": None,
        "seed": 12,
        "twin": None,
    }


def test_plain_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path, "a red fox", "", "  two cats ", name="mine.txt"), seed=2**32 - 2)
    assert [(prompt.line, prompt.record["prompt"], prompt.record["seed"]) for prompt in prompts] == [
        (1, "a red fox", 2**32 - 1),
        (3, "two cats", 1),
    ]
    assert all(prompt.given == {"prompt"} for prompt in prompts)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{prompt: a}", "line 2: not JSON: Expecting property name"),
        ("[]", "line 2: not a JSON object"),
        ({"promt": "a"}, "line 2: 'promt' is no field; did you mean prompt?"),
        ({"id": "a"}, "line 2: has no prompt"),
        ({"prompt": " "}, 'line 2: prompt: " " is not allowed'),
        ({"prompt": 5}, "line 2: prompt: 5 is not allowed; text that is not empty"),
        ({"prompt": "a", "id": "a/b"}, 'line 2: id: "a/b" is not allowed; letters, digits'),
        ({"prompt": "a", "id": "1"}, "line 2: id: '1' is that of line 1 too"),
        ({"prompt": "a", "twin": "b"}, "line 2: twin: no line has the id 'b'"),
        ({"prompt": "a", "seed": -1}, "line 2: seed: -1 is not allowed; an integer from 0 to 4294967295"),
        ({"prompt": "a", "seed": True}, "line 2: seed: true is not allowed"),
        ({"prompt": "a", "objects": []}, "line 2: objects: [] is not allowed; a list of one or two objects"),
        ({"prompt": "a", "objects": ["cat"]}, 'line 2: objects: "cat" is not allowed; {concept, count, colour, size}'),
        ({"prompt": "a", "objects": [{"count": 1}]}, "line 2: objects: an object has no concept"),
        ({"prompt": "a", "objects": [{"concept": "cat", "color": "red"}]}, "did you mean colour?"),
        (
            {"prompt": "a", "objects": [{"concept": "cat", "count": 6}]},
            "count: 6 is not allowed; an integer from 1 to 5",
        ),
        (
            {"prompt": "a", "objects": [{"concept": "cat", "size": "huge"}]},
            'size: "huge" is not allowed; small or large',
        ),
        ({"prompt": "a", "objects": [{"concept": "dig"}]}, "line 2: concept: 'dig' is not known; did you mean dog?"),
        (
            {"prompt": "a", "objects": [{"concept": "zebra"}]},
            "'zebra' is not known; allowed are apple, cat, dog, fox, thing 0, thing 1, thing 2, thing 3 and 16 more",
        ),
        (
            {"prompt": "a", "objects": [{"concept": "cat", "colour": "mauve"}]},
            "colour: 'mauve' is not known; allowed are",
        ),
        ({"prompt": "a", "relation": "on"}, "line 2: relation: 'on' is not allowed; only between two objects"),
        ({**FULL, "relation": "within"}, "line 2: relation: 'within' is not known; allowed are and, left of, on"),
        ({"prompt": "a", "style": "fat"}, "line 2: style: 'fat' is not known; did you mean flat?"),
        ({"prompt": "a", "background": "sea"}, 'line 2: background: "sea" is not allowed; {ground, colours}'),
        ({"prompt": "a", "background": {"colours": []}}, "line 2: background: has no ground"),
        ({"prompt": "a", "background": {"ground": "seas"}}, "line 2: ground: 'seas' is not known; did you mean sea?"),
        ({"prompt": "a", "background": {"ground": "sea", "colours": "white"}}, 'colours: "white" is not allowed'),
        ({"prompt": "a", "background": {"ground": "sea", "colours": ["tan"]}}, "colour: 'tan' is not known"),
        ({"prompt": "a", "objects": [{"concept": "cat"}] * 2}, "line 2: objects: 'cat' is named twice"),
        (
            '{"prompt": "a", "group": "\\ud800"}',
            "line 2: group: '\\ud800' is not allowed; text without lone surrogates",
        ),
        ("[" * 100_000, "line 2: not JSON: maximum recursion depth exceeded"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, line: object, told: str) -> None:
    assert told in refusal(written(tmp_path, {"prompt": "a cat"}, line))


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    """A JSON string may hold other separators as they are; str.splitlines() would cut it there."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a cat\u2028a dog"}\r\n{"prompt": "a fox\x85"}\n'.encode())
    assert [(prompt.line, prompt.record["prompt"]) for prompt in read_prompts(path)] == [
        (1, "a cat\u2028a dog"),
        (2, "a fox\x85"),
    ]


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    assert refusal(written(tmp_path, "", " ")) == "has no prompts"
    assert refusal(written(tmp_path, {**FULL, "group": "twins"})) == "has no prompts but those of the group 'twins'"
    assert refusal(tmp_path / "missing.jsonl") == "cannot be read: No such file or directory"
    (tmp_path / "binary").write_bytes(b"a\xff")
    assert refusal(tmp_path / "binary") == "not UTF-8 text: byte 1"


def test_metrics_need_their_fields(tmp_path: Path) -> None:
    path = written(tmp_path, FULL, {**FULL, "id": "2"}, {"prompt": "a cat", "objects": [{"concept": "cat"}]})
    prompts = read_prompts(path)
    check_metrics(path, prompts, ("score", "objects", "colours", "count", "all", "frechet"))
    with pytest.raises(SetupError) as caught:
        check_metrics(path, prompts, ("objects", "relation"))
    assert caught.value.message == f"metric relation needs the field relation, which {path} lacks: line 3"
    path = written(tmp_path, {**FULL, "relation": "and"})
    with pytest.raises(SetupError, match=r"metric relation: no prompt of .* says anything of it"):
        check_metrics(path, read_prompts(path), ("relation",))
    with pytest.raises(SetupError, match="two prompts or more"):
        check_metrics(path, read_prompts(path), ("frechet",))


def test_names_of_metrics() -> None:
    assert parse_metrics(None) is None
    assert parse_metrics("objects,frechet") == ("objects", "frechet")
    with pytest.raises(SetupError) as caught:
        parse_metrics("objects,colour")
    assert caught.value.message == f"--metrics: 'colour' is not allowed; {', '.join(METRICS)}"


@given(own=st.integers(1, 40), twinned=st.integers(0, 10), limit=st.integers(1, 50))
def test_a_sample_is_spread_over_the_file_and_brings_its_twins(own: int, twinned: int, limit: int) -> None:
    def prompt(line: int, name: str, twin: str | None) -> Prompt:
        group = "twins" if name.startswith("twin") else "own"
        return Prompt(line, frozenset(), {"id": name, "group": group, "twin": twin})

    twinned = min(own, twinned)
    prompts = [prompt(i, f"own-{i}", f"twin-{i}" if i < twinned else None) for i in range(own)]
    prompts += [prompt(own + i, f"twin-{i}", f"own-{i}") for i in range(twinned)]
    chosen = sample(prompts, limit)
    ids = [each.record["id"] for each in chosen]
    lines = [int(name.removeprefix("own-")) for name in ids if name.startswith("own")]
    assert len(lines) == min(limit, own)
    assert [each.line for each in chosen] == sorted(each.line for each in chosen)
    gaps = [after - before for before, after in pairwise(lines)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert [name for name in ids if name.startswith("twin")] == [f"twin-{line}" for line in lines if line < twinned]
    assert sample(prompts, None) == prompts
