"""What students share: they learn a lesson that is repeated, and places are drawn as told."""

from collections.abc import Callable

import pytest
import torch

from models.training import lcm
from models.training.consistency import Distillation, Tuning
from models.training.sampling import FixedBatch, predictor
from models.training.students import Lessons, LoraStudent, by_element, by_picture, places
from tests.models.training.small import CPU, PRESET, WIDTH, FakeRing, null, ranks, teacher, weights

BATCH = PRESET.lora_batch
RING = FakeRing()


def lcm_lessons(guide: FixedBatch) -> Lessons:
    return lcm.Lessons(PRESET, RING, BATCH, null(), guide, guide, ranks(), scale=3.0)


def distillation(guide: FixedBatch) -> Lessons:
    return Distillation(PRESET, RING, BATCH, null(), guide, guide, ranks())


def tuning(guide: FixedBatch) -> Lessons:
    return Tuning(RING, BATCH, guide, ranks())


@pytest.mark.parametrize(
    ("make", "distance"), [(lcm_lessons, by_element), (distillation, by_picture), (tuning, by_picture)]
)
def test_losses_fall(make: Callable[[FixedBatch], Lessons], distance: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A lesson of another teacher, taken again and again, is learnt by adapters alone."""
    start = weights(teacher())
    student = LoraStudent("student", PRESET, start, WIDTH, ranks(), rank=8, distance=distance, average=0.9)
    lesson = make(predictor(teacher(1).requires_grad_(False), "inference", BATCH, ranks())).draw(0.5)
    losses = []
    for _ in range(30):
        losses.append(float(student.step(*lesson)[1]))
        student.optimizer.step(1e-2)
    assert losses[-1] < 0.6 * losses[0]


def test_the_first_place_is_drawn_more_often() -> None:
    torch.manual_seed(0)
    drawn = places(40, 10_000, CPU)
    assert float((drawn == 0).float().mean()) == pytest.approx(0.15 + 0.85 / 40, abs=0.02)
    assert set(drawn.tolist()) == set(range(40))
