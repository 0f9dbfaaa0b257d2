"""The engine on small models of the real kinds: a picture does not depend on its company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.diffusion.loading import load_model
from service.config import EngineSettings
from service.diffusion.admission import resolve
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import Completed, Draft, Image, ImageRequest
from tests import tiny
from tests.service.diffusion.toy import drain

SETTINGS = EngineSettings(max_batch=6, max_running=8)


def draw(model, requests: list[ImageRequest]) -> dict[tuple[str, int], np.ndarray]:
    engine = DiffusionEngine(model, SETTINGS)
    for request in requests:
        engine.add(request)
    events = drain(engine)
    assert sum(isinstance(event, Completed) for event in events) == len(requests)
    return {(event.request_id, event.index): event.pixels for event in events if isinstance(event, Image)}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_picture_of_a_mixed_batch_is_its_solo_run(kind, tmp_path: Path):
    folder = getattr(tiny, kind)(tmp_path / kind)
    model = load_model(str(folder), dtype="float32", device="cpu", cache_dir=tmp_path / "cache")
    drafts = [
        Draft(prompt="a red apple", sampler="ddim", num_inference_steps=4, guidance_scale=5.0, seed=1),
        Draft(prompt="a blue fox", sampler="euler_a", num_inference_steps=6, guidance_scale=1.0, seed=2, n=2),
        Draft(prompt="two dogs", negative_prompt="cat", sampler="dpmpp_2m", num_inference_steps=3, seed=3),
        Draft(prompt="a cat", sampler="dpmpp_2m_sde", num_inference_steps=5, guidance_scale=9.0, seed=4),
        Draft(prompt="a tiny fox", sampler="euler", num_inference_steps=4, width=128, height=64, seed=5),
    ]
    requests = [resolve(draft, model.card, SETTINGS, id=str(i), random_seed=0) for i, draft in enumerate(drafts)]
    together = draw(model, requests)
    assert len(together) == 6
    assert together["4", 0].shape == (64, 128, 3)
    assert np.abs(together["0", 0].astype(int) - together["1", 0].astype(int)).max() > 20
    for request in requests:
        for key, alone in draw(model, [request]).items():
            difference = np.abs(alone.astype(int) - together[key].astype(int)).max()
            assert difference <= 2, f"{key}: {difference}"


def test_a_batch_of_a_bundles_students_is_their_solo_runs(tmp_path: Path):
    """The teacher, its LCM student, the consistency model, and the LCM-LoRA on the teacher, step by step together."""
    folder = tiny.bundle_with_loras(tmp_path / "bundle")
    model = load_model(str(folder), dtype="float32", device="cpu", cache_dir=tmp_path / "cache")
    lcm_lora = (("lcm-lora", 1.0),)
    drafts = [
        Draft(prompt="a red apple", sampler="lcm", num_inference_steps=3, guidance_scale=5.0, seed=1),
        Draft(prompt="a blue fox", sampler="ddim", num_inference_steps=5, seed=2, negative_prompt="cat"),
        Draft(prompt="two dogs", sampler="consistency", num_inference_steps=2, seed=3, n=2),
        Draft(prompt="a cat", sampler="consistency", num_inference_steps=4, seed=4),
        Draft(prompt="two dogs", loras=lcm_lora, num_inference_steps=4, seed=3, negative_prompt="cat"),
        Draft(prompt="two dogs", sampler="lcm", num_inference_steps=4, seed=3),
        Draft(prompt="a tiny fox", loras=(("tuned", 0.5),), num_inference_steps=3, seed=6),
    ]
    requests = [resolve(draft, model.card, SETTINGS, id=str(i), random_seed=0) for i, draft in enumerate(drafts)]
    assert [request.sampler for request in requests[4:]] == ["lcm", "lcm", "consistency"]
    together = draw(model, requests)
    assert np.abs(together["4", 0].astype(int) - together["5", 0].astype(int)).max() > 20
    for request in requests:
        for key, alone in draw(model, [request]).items():
            difference = np.abs(alone.astype(int) - together[key].astype(int)).max()
            assert difference <= 2, f"{key}: {difference}"


def test_a_distilled_guidance_costs_one_evaluation_a_step_and_says_what_it_ignores(tmp_path: Path):
    folder = tiny.bundle_with_loras(tmp_path / "bundle")
    model = load_model(str(folder), dtype="float32", device="cpu", cache_dir=tmp_path / "cache")
    engine = DiffusionEngine(model, SETTINGS)
    for i, loras in enumerate([(), (("lcm-lora", 1.0),)]):
        sampler = None if loras else "consistency"
        draft = Draft(prompt="a cat", negative_prompt="dull", sampler=sampler, loras=loras, num_inference_steps=3)
        engine.add(resolve(draft, model.card, SETTINGS, id=str(i), random_seed=0))
    events = drain(engine)
    assert [event.evaluations for event in events if isinstance(event, Image)] == [3, 3]
    warnings = [event.warnings for event in events if isinstance(event, Completed)]
    assert all("negative_prompt: it has no effect" in warning for (warning,) in warnings)


def test_a_class_conditional_consistency_model_draws_the_class_asked_for(tmp_path: Path):
    model = load_model(
        str(tiny.consistency(tmp_path / "cm", num_classes=3)),
        dtype="float32",
        device="cpu",
        cache_dir=tmp_path / "cache",
    )
    width, height = model.card.default_size
    drafts = [Draft(prompt="", class_label=label, num_inference_steps=2, seed=1) for label in (0, 1)]
    requests = [resolve(draft, model.card, SETTINGS, id=str(i), random_seed=0) for i, draft in enumerate(drafts)]
    pictures = draw(model, requests)
    assert pictures["0", 0].shape == (height, width, 3)
    assert (pictures["0", 0] != pictures["1", 0]).any()
