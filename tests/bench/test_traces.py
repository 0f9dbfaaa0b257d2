from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from traces import NEW, POPULAR, Asked, read_trace, synthetic, told

from tests.service.calibration.test_edits import record, thing

COLOURS = ("red", "blue", "green", "pink", "teal")
RECORDS: list[dict[str, Any]] = [
    record(
        f"a {colour} thing{number} on a {ground} background",
        objects=[thing(f"thing{number}", colour)],
        background={"ground": "plain", "colours": [ground]},
    )
    for number, (colour, ground) in enumerate((colour, ground) for colour in COLOURS for ground in COLOURS * 20)
]


@pytest.fixture(scope="module")
def stream() -> list[Asked]:
    return synthetic(RECORDS, 2000, seed=0)


def test_the_seed_decides(stream: list[Asked]) -> None:
    assert synthetic(RECORDS, 2000, seed=0) == stream
    assert synthetic(RECORDS, 2000, seed=1) != stream


def test_as_many_are_new_as_documented(stream: list[Asked]) -> None:
    own = {each["prompt"] for each in RECORDS}
    fresh = Counter(each.record["prompt"] for each in stream if each.record["prompt"] in own)
    assert len(fresh) / len(stream) == pytest.approx(NEW, abs=0.03)


def test_popularity_falls_with_the_rank(stream: list[Asked]) -> None:
    own = {each["prompt"] for each in RECORDS}
    asked = [each.record["prompt"] for each in stream if each.record["prompt"] in own]
    first = list(dict.fromkeys(asked))
    counts = Counter(asked)
    head, tail = sum(counts[prompt] for prompt in first[:20]), sum(counts[prompt] for prompt in first[-20:])
    assert head > 5 * tail


def test_sessions_change_one_word_at_a_time(stream: list[Asked]) -> None:
    users = Counter(each.user for each in stream)
    longest = max(users, key=lambda user: users[user])
    prompts = [each.record["prompt"].replace("an ", "a ").split() for each in stream if each.user == longest]
    assert len(prompts) >= 5
    for before, after in pairwise(prompts):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    alone = sum(count == 1 for count in users.values())
    assert alone / len(stream) > POPULAR - 0.05


def test_times_ascend_and_seeds_differ(stream: list[Asked]) -> None:
    times = [each.time for each in stream]
    assert times == sorted(times)
    assert times[-1] / len(times) == pytest.approx(1, abs=0.1)
    assert len({each.record["seed"] for each in stream}) == len(stream)


def test_records_describe_what_their_prompts_ask(stream: list[Asked]) -> None:
    for each in stream:
        for name in (each.record["objects"][0]["concept"], *each.record["background"]["colours"]):
            assert name in each.record["prompt"]


def test_more_new_prompts_than_records() -> None:
    stream = synthetic(RECORDS[:5], 200, seed=0)
    assert len({each.record["prompt"] for each in stream}) > 40


def test_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("a cat\n\n a dog \na cat\n")
    stream = read_trace(path, seed=3)
    assert [each.record["prompt"] for each in stream] == ["a cat", "a dog", "a cat"]
    assert [each.record["seed"] for each in stream] == [3, 4, 5]
    assert all(each.record["objects"] is None for each in stream)
    assert told(stream) == "3 requests of 1 users, 2 different prompts"


def test_json_lines_in_the_order_of_their_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"prompt": "a dog", "timestamp": "2022-08-07 22:57", "user_name": "b"},
        {"prompt": "a cat", "timestamp": "2022-08-07 22:50", "user_name": "a", "cfg": 7},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(each.record["prompt"], each.user) for each in read_trace(path, 0)] == [("a cat", "a"), ("a dog", "b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "has no prompts"), ('{"text": "a cat"}', "request 1 has no prompt"), ('{"prompt"', "Expecting")],
)
def test_what_is_no_stream(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        read_trace(path, 0)


def test_parquet_wants_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit, match="pyarrow is not installed"):
        read_trace(tmp_path / "trace.parquet", 0)
