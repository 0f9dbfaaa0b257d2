from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.diffusion.loading import load_model
from models.scorer import Reading
from service.calibration.diversity import PICTURES, Answers, layouts, spread
from service.calibration.drawing import Drawing, Start
from service.config import ModelSettings
from service.evaluation.material import open_material
from tests.service.evaluation.test_command import home  # noqa: F401


def test_the_distance_is_that_of_lpips() -> None:
    patches = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    reading = Reading(**dict.fromkeys(Reading._fields, patches))
    unit = patches / patches.norm(dim=-1, keepdim=True)
    pairs = [((unit[i] - unit[j]) ** 2).sum(-1).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert spread(layouts(reading)) == pytest.approx(float(sum(pairs)) / 3, rel=1e-5)


def test_only_noise_of_their_own_makes_pictures_from_one_latent_differ(home: Path) -> None:  # noqa: F811
    scorer = open_material(ModelSettings(model=str(home), device="cpu")).scorer
    model = load_model(str(home), device="cpu", dtype="float32", cache_dir=home)
    records = [{"prompt": "a red apple", "seed": 1}, {"prompt": "a flat cat", "seed": 2**32 - 1}]
    answers = Answers(Drawing(model, "ddim", 4, batch=PICTURES), model, scorer, records, (1, 3))
    assert answers.scratch > 0
    assert answers.distance(Start(3, 3)) == pytest.approx(0, abs=1e-6)
    assert 0 < answers.distance(Start(3, 2)) < answers.distance(Start(3, 1))
