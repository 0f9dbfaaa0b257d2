"""The scorer's training: targets against scenes, text against open_clip's adapter, and a run in miniature."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from models.scorer.network import ScorerNetwork
from models.scorer.scorer import text_tower
from models.training.captions import CaptionWriter, vocabulary
from models.training.checkpoints import Checkpoints
from models.training.concepts import load_concepts
from models.training.networks import build_vae, frozen
from models.training.scenes import Scenes, Stage
from models.training.scorer import (
    Alteration,
    ScorerBatches,
    ScorerLoss,
    Targets,
    alter,
    altered,
    make_scorer,
    sentences,
    sizes_of,
    train_scorer,
    vocabulary_of,
)
from models.training.settings import FULL
from models.training.sprites import draw_shapes
from models.training.text import TextTower, tiny_tower
from models.training.validation import calibrate
from tests.models.training.small import CPU, PRESET, Ticking, ranks


@cache
def stage() -> Stage:
    concepts = [concept for concept in load_concepts() if all(concept.drawings)]
    tintable = [concept for concept in concepts if concept.tintable]
    return Stage(draw_shapes(chosen := (*concepts[:4], *tintable[-2:]), 32), chosen, CPU)


@cache
def writer() -> CaptionWriter:
    concepts = stage().concepts
    draft = CaptionWriter(concepts, tiny_tower(["a"], CPU))
    return CaptionWriter(concepts, tiny_tower(vocabulary(concepts, draft.phrases), CPU))


def tower() -> TextTower:
    return writer()._tower


def batches(count: int) -> ScorerBatches:
    return ScorerBatches(stage(), writer(), tower(), sizes_of(PRESET, tower().width), count, None)


def test_targets_say_who_is_seen_where() -> None:
    torch.manual_seed(0)
    scenes = stage().sample(64)
    targets = Targets.of(scenes, stage().compose_with_owners(scenes, 32, 4)[1])
    torch.testing.assert_close(targets.cover.sum(1), torch.ones(64, 16))
    assert ((targets.density.sum(2) - scenes.count).abs() < 1e-3).float().mean() > 0.98  # all but the hidden ones
    assert not (targets.density[:, 1] > 0)[scenes.count[:, 1] == 0].any()
    assert ((targets.density > 0) <= (targets.cover[:, 1:] > 0)).all()
    single = scenes.count[:, 1] == 0
    assert (targets.relation[single] == -100).all()
    assert (targets.relation[~single] == torch.where(scenes.relation > 0, scenes.relation - 1, -100)[~single]).all()
    assert ((targets.top == -100) == (scenes.ground >= 4)).all()


def test_sentences_are_open_clips_mean_pooling() -> None:
    network = ScorerNetwork(sizes_of(PRESET, tower().width), vocabulary_of(stage()))
    ids = tower().tokens(["a cat", "two dogs on a table", ""])
    adapter = text_tower(tower().model, network.projection).eval()
    with torch.no_grad():
        torch.testing.assert_close(network.projection(sentences(tower(), ids)), adapter(ids), rtol=1e-4, atol=1e-5)


MEANING = ("concept", "count", "tint", "size", "relation", "style", "ground", "top", "bottom", "styled", "named")
CHANGED = {
    Alteration.OBJECT: {"concept"},
    Alteration.COUNT: {"count"},
    Alteration.COLOUR: {"tint"},
    Alteration.EXCHANGE: {"concept", "count", "tint", "size"},
    Alteration.STYLE: {"style"},
    Alteration.GROUND: {"top", "bottom"},
}


def _differing(ours: Scenes, theirs: Scenes, row: int) -> set[str]:
    return {
        field.name
        for field in fields(Scenes)
        if not torch.equal(getattr(ours, field.name)[row], getattr(theirs, field.name)[row])
    }


@pytest.mark.parametrize("alteration", list(Alteration))
def test_an_alteration_changes_one_thing_if_it_is_said(alteration: Alteration) -> None:
    torch.manual_seed(1)
    scenes = stage().sample(64)
    wrong, said = alter(scenes, torch.full((64,), int(alteration)), len(stage().concepts))
    assert said.any()
    for row in range(64):
        differing = _differing(scenes, wrong, row)
        assert differing <= (CHANGED[alteration] if said[row] else set())
        assert bool(differing) == bool(said[row])
    assert (wrong.tint[:, 0] > 0).all() or alteration is not Alteration.COLOUR
    assert ((wrong.count[:, 0] >= 1) & (wrong.count[:, 0] <= 5)).all()


def test_every_scene_is_altered_for_training() -> None:
    torch.manual_seed(2)
    scenes = stage().sample(200)
    wrong = altered(scenes, len(stage().concepts))
    assert all(_differing(scenes, wrong, row) for row in range(200))


def test_equal_captions_are_no_negatives() -> None:
    torch.manual_seed(3)
    drawn = batches(16)
    _, captions, wrong, same, *_ = drawn.draw()
    texts = torch.cat([captions, wrong])
    equal = (captions[:, None] - texts[None]).abs().amax(2) < 1e-6
    equal.fill_diagonal_(False)
    assert torch.equal(same, equal)


def test_the_vae_touches_one_picture_in_eight() -> None:
    vae = frozen(build_vae(PRESET), CPU, torch.float32)
    with_vae = ScorerBatches(stage(), writer(), tower(), sizes_of(PRESET, tower().width), 16, vae)
    pictures = torch.rand(16, 3, 32, 32)
    changed = (with_vae._decoded(pictures, vae) != pictures).flatten(1).any(1)
    assert int(changed.sum()) == 2


def test_one_batch_can_be_learned_by_heart() -> None:
    """Every loss falls and every accuracy rises, so every head is fed by its own targets."""
    torch.manual_seed(4)
    arguments = batches(16).draw()
    network = ScorerNetwork(sizes_of(PRESET, tower().width), vocabulary_of(stage()))
    loss = ScorerLoss(network, torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    told = []
    for _ in range(120):
        total, figures = loss(*arguments)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        told.append(figures)
    first, last = torch.stack(told[:3]).mean(0), torch.stack(told[-5:]).mean(0)
    losses, hits = slice(0, 12), slice(12, None)
    assert (last[losses] < 0.75 * first[losses]).all(), (first, last)
    assert (last[hits] > 0.6).all(), last


def test_a_run_in_miniature_is_kept_and_calibrated(tmp_path: Path) -> None:
    preset = replace(PRESET, scorer_batch=8)
    whole = ranks(Ticking())
    weights, _ = train_scorer(preset, stage(), writer(), tower(), whole, Checkpoints(tmp_path, whole), 1)
    assert all(value.isfinite().all() for value in weights.values())
    again, _ = train_scorer(preset, stage(), writer(), tower(), whole, Checkpoints(tmp_path, whole), 1)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    thresholds, figures = calibrate(preset, weights, stage(), writer(), tower(), 8)
    assert 0.2 < thresholds.present < 0.8
    assert set(figures["renders"]) >= {"single", "pair", "counts", "recoloured"}
    assert figures["told wrongly"]["wrong object"].keys() == {"true", "wrong", "true score", "wrong score", "preferred"}
    assert figures["pictures"]["noise"]["frechet"] > figures["pictures"]["renders"]["frechet"]
    scorer = make_scorer(preset, weights, stage(), tower(), thresholds)
    assert scorer.embed_text(["a cat"]).shape == (1, 32)


def test_the_full_size_keeps_its_promise() -> None:
    """At most 6 million trained parameters with a full table of concepts, 12 MB in float16."""
    words = replace(vocabulary_of(stage()), names=tuple(map(str, range(1400))))
    network = ScorerNetwork(sizes_of(FULL, 384), words)
    assert sum(parameter.numel() for parameter in network.parameters()) < 6_000_000
    assert sizes_of(FULL, 384).cells == 16
