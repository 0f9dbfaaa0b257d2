"""Scenes: what training may see, what evaluation must see, where things stand, and how they are drawn.

The concepts are the first twelve of the table that may be drawn in another colour, as simple shapes of side 64.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.training.concepts import COLOURS, STYLES, TINTS, WHITE, load_concepts
from models.training.grounds import COLOURED
from models.training.layouts import PLACEMENTS
from models.training.scenes import GROUNDS, KINDS, LARGE, RELATIONS, SMALL, Scenes, Stage
from models.training.sprites import draw_shapes

CONCEPTS = tuple(concept for concept in load_concepts() if concept.tintable)[:12]
SEEDS = st.integers(0, 2**31)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(draw_shapes(CONCEPTS, 64), CONCEPTS, CPU)


def arranged(
    stage: Stage,
    relation: str = "and",
    count: tuple[int, int] = (1, 1),
    size: tuple[int, int] = (0, 0),
    ground: str = "plain",
    total: int = 64,
) -> Scenes:
    """Scenes of the first two concepts in the first style, with this layout and white grounds."""

    def full(*values: int) -> torch.Tensor:
        return torch.tensor(values).expand(total, -1).clone()

    (relations, styles, grounds, white) = full(RELATIONS.index(relation), 0, GROUNDS.index(ground), WHITE).unbind(1)
    said = torch.ones(total, dtype=torch.bool)
    return stage.arrange(
        full(0, 1), full(*count), full(0, 0), full(*size), relations, styles, grounds, white, white, said, said
    )


def boxes(scenes: Scenes, group: int) -> tuple[torch.Tensor, ...]:
    """Left, right, top and bottom [B] of what the group's squares span."""
    x, y, scale = scenes.place.unbind(-1)
    there = (scale > 0) & (scenes.group == group)
    return (
        torch.where(there, x - scale, 9).amin(1),
        torch.where(there, x + scale, -9).amax(1),
        torch.where(there, y - scale, 9).amin(1),
        torch.where(there, y + scale, -9).amax(1),
    )


def scales(scenes: Scenes, group: int) -> torch.Tensor:
    """The largest scale [B] in the group."""
    return torch.where(scenes.group == group, scenes.place[..., 2], 0).amax(1)


@settings(max_examples=10)
@given(seed=SEEDS)
def test_training_shows_nothing_held_out_and_nothing_undrawn(stage: Stage, seed: int) -> None:
    torch.manual_seed(seed)
    scenes = stage.sample(256)
    two = scenes.count[:, 1] > 0
    for group, shown in ((0, torch.ones_like(two)), (1, two)):
        concept, tint = scenes.concept[:, group], scenes.tint[:, group]
        assert stage.drawn[concept, scenes.style][shown].all()
        for colour in (scenes.top, scenes.bottom):
            assert not stage.held_out_colours[concept, scenes.style, colour][shown].any()
        assert not stage.held_out_tints[concept, tint][shown].any()
    assert not stage.held_out_pairs[scenes.concept[:, 0], scenes.concept[:, 1]][two].any()
    assert not (two & (scenes.concept[:, 0] == scenes.concept[:, 1])).any()


@settings(max_examples=10)
@given(seed=SEEDS, kind=st.sampled_from(KINDS))
def test_every_held_out_scene_shows_what_training_never_did(stage: Stage, seed: int, kind: str) -> None:
    torch.manual_seed(seed)
    scenes = stage.sample_held_out(64, kind)
    first, second = scenes.concept.unbind(1)
    colours = stage.held_out_colours[first, scenes.style].gather(1, scenes.top[:, None])[:, 0]
    tints = stage.held_out_tints[first, scenes.tint[:, 0]]
    pairs = stage.held_out_pairs[first, second] & (scenes.count[:, 1] > 0)
    shown = {"recoloured": tints, "pair": pairs, "mixed": pairs}.get(kind, colours)
    assert shown.all()
    assert stage.drawn[scenes.concept, scenes.style[:, None]].all()
    assert scenes.named.all()
    count = scenes.count.sum(1)
    expected = {"counts": (2, 5), "pair": (2, 2), "mixed": (3, 5)}.get(kind, (1, 1))
    assert count.min() >= expected[0]
    assert count.max() <= expected[1]
    assert (scenes.size[:, 0] > 0).all() if kind == "sized" else kind == "pair" or not scenes.size.any()


def test_shares_and_promises_of_the_held_out_tables(stage: Stage) -> None:
    drawn = int(stage.drawn.sum()) * (len(COLOURS) - 1)
    assert int(stage.held_out_colours.sum()) == round(0.05 * drawn)
    assert not stage.held_out_colours[..., WHITE].any()
    assert not stage.held_out_tints[:, 0].any()
    assert int(stage.held_out_tints.sum()) == round(0.1 * len(CONCEPTS) * len(TINTS))
    assert torch.equal(stage.held_out_pairs, stage.held_out_pairs.T)
    again = Stage(draw_shapes(CONCEPTS, 64), CONCEPTS, CPU)
    assert torch.equal(again.held_out_colours, stage.held_out_colours)


def test_nothing_of_a_kind_held_out_is_one_clear_error() -> None:
    alone = Stage(draw_shapes(CONCEPTS[:1], 64), CONCEPTS[:1], CPU)
    with pytest.raises(ValueError, match="nothing held out of the kind pair"):
        alone.sample_held_out(4, "pair")


@settings(max_examples=10)
@given(seed=SEEDS)
def test_fields_agree_with_each_other(stage: Stage, seed: int) -> None:
    torch.manual_seed(seed)
    scenes = stage.sample(256)
    there = scenes.place[..., 2] > 0
    for group in (0, 1):
        assert torch.equal((there & (scenes.group == group)).sum(1), scenes.count[:, group])
    x, y, scale = scenes.place.unbind(-1)
    reach = scale * (scenes.turn.cos().abs() + scenes.turn.sin().abs())
    assert (x.abs() + reach)[there].max() <= 1 + 1e-5
    assert (y.abs() + reach)[there].max() <= 1 + 1e-5
    one = scenes.count[:, 1] == 0
    assert not scenes.relation[one].any()
    assert not scenes.tint[:, 1][one].any()
    bare = (scenes.ground >= COLOURED) | ~scenes.named
    assert (scenes.top[bare] == WHITE).all()
    assert (scenes.ground[~scenes.named] == GROUNDS.index("plain")).all()
    assert (scenes.style[~scenes.styled] == STYLES.index("3d")).all()
    same = scenes.top == scenes.bottom
    assert torch.equal(same, (scenes.ground == GROUNDS.index("plain")) | (scenes.ground >= COLOURED))


def test_every_meaning_comes_up(stage: Stage) -> None:
    torch.manual_seed(0)
    scenes = stage.sample(4096)
    assert set(scenes.relation.tolist()) == set(range(len(RELATIONS)))
    assert set(scenes.ground.tolist()) == set(range(len(GROUNDS)))
    assert set(scenes.tint[:, 0].tolist()) == set(range(len(TINTS) + 1))
    assert set(scenes.size[:, 1].tolist()) == {0, SMALL, LARGE}
    assert set(scenes.count.sum(1).tolist()) == set(range(1, PLACEMENTS + 1))
    assert set(scenes.concept[:, 0].tolist()) == set(range(len(CONCEPTS)))


@pytest.mark.parametrize("ground", ["plain", "table"])
@pytest.mark.parametrize("count", [(1, 1), (2, 1), (1, 3), (2, 3), (4, 1)])
@pytest.mark.parametrize("relation", ["and", "left of", "right of", "above", "below"])
def test_groups_beside_each_other_are_clear_of_each_other(
    stage: Stage, relation: str, count: tuple[int, int], ground: str
) -> None:
    torch.manual_seed(0)
    scenes = arranged(stage, relation, count, ground=ground)
    first, second = boxes(scenes, 0), boxes(scenes, 1)
    gap = {
        "and": second[0] - first[1],
        "left of": second[0] - first[1],
        "right of": first[0] - second[1],
        "above": second[2] - first[3],
        "below": first[2] - second[3],
    }[relation]
    assert gap.min() > -0.1


@pytest.mark.parametrize("size", [(0, 0), (SMALL, 0), (0, LARGE), (LARGE, SMALL)])
@pytest.mark.parametrize("relation", ["behind", "in front of"])
def test_the_farther_object_is_partly_hidden(stage: Stage, relation: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    scenes = arranged(stage, relation, size=size)
    _, owners = stage.compose_with_owners(scenes, 64, 16)
    nearer = 1 if relation == "behind" else 0
    assert (scenes.group[:, :2] == torch.tensor([1 - nearer, nearer])).all()
    seen = owners[:, 1].sum((1, 2))
    alone = scenes[:]
    alone.place = scenes.place.clone()
    alone.place[:, 1, 2] = 0
    share = seen / stage.compose_with_owners(alone, 64, 16)[1][:, 1].sum((1, 2))
    assert share.max() < 1
    assert share.mean() < 0.95
    assert share.min() > 0.4


def test_what_is_on_something_stands_on_top_of_it_and_touches_it(stage: Stage) -> None:
    torch.manual_seed(0)
    scenes = arranged(stage, "on")
    _, owners = stage.compose_with_owners(scenes, 128, 128)
    assert (scenes.group[:, :2] == torch.tensor([1, 0])).all()
    lower, upper = (owners[:, index].amax(2) > 0.5 for index in (1, 2))
    rows = torch.arange(128)
    feet, head = torch.where(upper, rows, -1).amax(1), torch.where(lower, rows, 999).amin(1)
    assert (feet - head).abs().max() <= 4
    assert (scenes.place[:, 1, 0] - scenes.place[:, 0, 0]).abs().max() < 0.1


def test_sizes_that_are_said_can_be_seen(stage: Stage) -> None:
    torch.manual_seed(0)
    usual, small, large = (scales(arranged(stage, count=(1, 0), size=(size, 0)), 0) for size in (0, SMALL, LARGE))
    assert small.max() < 0.75 * usual.min()
    assert large.min() > 1.1 * usual.max()
    for relation in RELATIONS:
        pair = arranged(stage, relation, size=(SMALL, LARGE))
        assert (scales(pair, 0) < 0.7 * scales(pair, 1)).all()


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_several_of_a_kind_hardly_overlap(stage: Stage, count: int) -> None:
    torch.manual_seed(0)
    scenes = arranged(stage, count=(count, 0), total=128)
    place = scenes.place[:, :count]
    apart = (place[:, :, None, :2] - place[:, None, :, :2]).abs().amax(-1)
    overlap = place[:, :, None, 2] + place[:, None, :, 2] - apart
    assert overlap.masked_fill(torch.eye(count, dtype=torch.bool), -1).max() < 0.15


@pytest.mark.parametrize("ground", ["sky and grass", "sand", "table"])
def test_objects_stand_low_on_ground_that_bears_them(stage: Stage, ground: str) -> None:
    torch.manual_seed(0)
    _, _, _, bottom = boxes(arranged(stage, count=(1, 0), ground=ground), 0)
    assert bottom.min() > 0.6


def test_owners_sum_to_one_and_match_the_picture(stage: Stage) -> None:
    torch.manual_seed(0)
    scenes = stage.sample(24)
    pictures, owners = stage.compose_with_owners(scenes, 64, 16)
    assert torch.equal(pictures, stage.compose(scenes, 64))
    torch.testing.assert_close(owners.sum(1), torch.ones(24, 16, 16))
    seen = owners[:, 1:].amax((2, 3)) > 0
    assert not seen[scenes.place[..., 2] == 0].any()


def test_pictures_of_two_sizes_show_the_same(stage: Stage) -> None:
    torch.manual_seed(0)
    scenes = stage.sample(8)
    small, large = stage.compose(scenes, 256), stage.compose(scenes, 512)
    difference = (F.avg_pool2d(large, 2) - small).abs()
    assert difference.mean() < 0.01
    assert difference.mean((1, 2, 3)).max() < 0.03


def test_pictures_stay_in_range_and_do_not_depend_on_the_batch(stage: Stage) -> None:
    torch.manual_seed(0)
    scenes = stage.sample(160)
    pictures = stage.compose(scenes, 64)
    assert pictures.abs().max() <= 1 + 1e-5
    rows = torch.tensor([3, 140, 80])
    torch.testing.assert_close(stage.compose(scenes[rows], 64), pictures[rows], atol=1e-5, rtol=0)
    again = stage.compose(Scenes.cat([scenes[:5], scenes[5:]]), 64)
    torch.testing.assert_close(again, pictures, atol=1e-5, rtol=0)
