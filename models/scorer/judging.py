"""From what a picture shows to whether it shows what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from models.errors import ModelError
from models.scorer.config import Thresholds, Vocabulary
from models.scorer.network import ScorerNetwork

if TYPE_CHECKING:
    from models.scorer.scorer import Reading

_NOTHING = -1


class Measures(NamedTuple):
    """What N pictures show of what their records name; a record names one or two objects.

    counts: [N, 2], objects of each named concept. extra: [N], objects of the commonest concept that was not named.
    tints: [N, 2], the prevailing tint of each. relation, style, ground, top, bottom: [N]. -1 stands for nothing.
    """

    counts: list[list[float]]
    extra: list[float]
    tints: list[list[int]]
    relation: list[int]
    style: list[int]
    ground: list[int]
    top: list[int]
    bottom: list[int]


STRIPES = "stripes"
METRICS = ("objects", "colours", "relation", "count", "style", "background", "all")
Verdicts = dict[str, list[bool | None]]
"""A list per metric with an entry per record; None where the record does not say.

objects: every named concept is there and has more objects than any that is not named, of which there are none.
colours: every named colour prevails over the patches of its object, or is its own and it is not recoloured.
relation: the first stands to the second as named; "and" says nothing of it.
count: there are as many of each as named; None if a record names single objects only.
style, background: as named, the background with its colours.
all: none of these is false, and single objects are single.
"""


def _index(word: str, words: Sequence[str], what: str) -> int:
    try:
        return words.index(word)
    except ValueError:
        raise ModelError(f"{what} '{word}' is not one that the scorer knows") from None


def measure(
    network: ScorerNetwork, reading: Reading, records: Sequence[Mapping[str, Any]], vocabulary: Vocabulary
) -> Measures:
    """Count objects by concept, and look at tint and relation of those that are named."""
    if len(records) != len(reading.embedding):
        raise ModelError(f"{len(records)} records for {len(reading.embedding)} pictures")
    places = {name: index for index, name in enumerate(vocabulary.names)}
    rows = []
    for record in records:
        names = [entry["concept"] for entry in record["objects"]]
        if not 1 <= len(names) <= 2:
            raise ModelError(f"a record names {len(names)} objects: one or two can be judged")
        for name in names:
            if name not in places:
                raise ModelError(f"concept '{name}' is not one that the scorer knows")
        rows.append([places[name] for name in names] + [_NOTHING] * (2 - len(names)))
    named = torch.tensor(rows, device=reading.concept.device)  # [N, 2]
    totals = reading.density.new_zeros(len(rows), len(places)).scatter_add(1, reading.concept, reading.density)
    counts = totals.gather(1, named.clamp(min=0)) * (named >= 0)
    others = totals.scatter(1, named.where(named >= 0, named[:, :1]), 0)
    cover = (reading.concept[:, None] == named[:, :, None]) * reading.cover[:, None]  # [N, 2, P]
    there = cover.sum(2) > 0
    tints = (cover @ reading.tint).argmax(2).where(there, _NOTHING)
    relation = network.relation_logits(reading.patches.float(), cover).argmax(1).where(there.all(1), _NOTHING)
    whole = (reading.style, reading.ground, reading.top, reading.bottom)
    return Measures(*(part.tolist() for part in (counts, others.amax(1), tints, relation, *whole)))


def verdicts(
    measures: Measures, records: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, thresholds: Thresholds
) -> Verdicts:
    """Hold what was measured against what the records say."""
    rows = zip(zip(*measures, strict=True), records, strict=True)
    found = [_verdict(Measures(*row), record, vocabulary, thresholds) for row, record in rows]
    return dict(zip(METRICS, map(list, zip(*found, strict=True)), strict=True))


def _verdict(
    found: Any, record: Mapping[str, Any], vocabulary: Vocabulary, thresholds: Thresholds
) -> tuple[bool | None, ...]:
    """One record's metrics in the order of METRICS; `found` holds one row of Measures."""
    objects = record["objects"]
    fewest = min(found.counts[: len(objects)])
    shown = fewest >= thresholds.present and found.extra < min(thresholds.extra, fewest)

    names, words = [entry["concept"] for entry in objects], [entry["colour"] for entry in objects]
    tinted = [
        seen == _index(word, vocabulary.tints, "colour") or (seen == 0 and word in vocabulary.own.get(name, ()))
        for seen, name, word in zip(found.tints, names, words, strict=False)
        if word
    ]
    colours = all(tinted) if tinted else None

    counted = all(round(seen) == entry["count"] for seen, entry in zip(found.counts, objects, strict=False))
    plural = any(entry["count"] > 1 for entry in objects)

    relation = record["relation"]
    stands = None
    if relation not in (None, "and"):
        stands = found.relation == _index(relation, vocabulary.relations, "relation")

    style = record["style"]
    drawn = None if style is None else found.style == _index(style, vocabulary.styles, "style")

    behind = None
    if record["background"] is not None:
        ground, named = record["background"]["ground"], record["background"]["colours"]
        behind = found.ground == _index(ground, vocabulary.grounds, "background")
        if named:
            wanted = [_index(word, vocabulary.colours, "background colour") for word in (named[0], named[-1])]
            if ground == STRIPES:  # which look the same either way round
                wanted.sort()
            behind = behind and [found.top, found.bottom] == wanted

    metrics = (shown, colours, stands, counted if plural else None, drawn, behind)
    return (*metrics, counted and False not in metrics)
