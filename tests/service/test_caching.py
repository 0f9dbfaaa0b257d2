"""The latent cache behind the engine: what is stored is found again, by whom it may be found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from accel.samplers.library import build_plan
from cache.latent.lookup import LatentCache
from cache.latent.policy import nirvana
from cache.latent.store import MemoryStore
from service.caching import CacheStarts, family_of, levels_of
from service.diffusion import starts
from service.diffusion.engine import DiffusionEngine
from service.diffusion.request import CacheIntent, Image, ImageRequest
from tests.service.diffusion.toy import CARD, CHANNELS, ToyModel, drain, request, settings

LEVELS = levels_of(ToyModel())


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no fault."""
    monkeypatch.setattr(starts, "PATIENCE_S", 30.0)


@pytest.fixture
def cache() -> Iterator[LatentCache]:
    policy = replace(nirvana(LEVELS), families={"solver": ((0.9, LEVELS[20]),), "lcm": ((0.9, LEVELS[10]),)})
    cache = LatentCache(MemoryStore(), 1_000_000, policy, seed=0)
    yield cache
    assert cache.close()


def towards(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return np.array([np.cos(angle), np.sin(angle), 0.0, 0.0], np.float32)


def asked(
    id: str = "a", degrees: float = 0.0, tenant: str = "t", look: bool = True, store: bool = True, **changes: object
) -> ImageRequest:
    intent = CacheIntent(embedding=towards(degrees), look=look, store=store)
    return replace(request(id, steps=50, guidance_scale=3.0), tenant=tenant, cache=intent, **changes)


def draw(cache: LatentCache, *requests: ImageRequest) -> list[Image]:
    """The requests' pictures, one request after the other."""
    engine = DiffusionEngine(ToyModel(), settings(), starts=CacheStarts(cache, ToyModel(), "toy@1"))
    drawn: list[Image] = []
    for each in requests:
        engine.add(each)
        drawn += [event for event in drain(engine) if isinstance(event, Image)]
        assert engine._starts is not None
        engine._starts._pool.submit(lambda: None).result()
        assert cache.flush(30)
        assert not engine._starts.faults
    return drawn


def test_a_picture_starts_from_what_a_like_prompt_left(cache: LatentCache) -> None:
    first, same, like, other = draw(
        cache, asked("a"), asked("b", seed=8), asked("c", degrees=20, seed=9), asked("d", degrees=80, seed=10)
    )
    assert [image.cache_result for image in (first, same, like, other)] == ["miss", "hit", "hit", "miss"]
    rows = build_plan("ddim", ToyModel().schedule("ddim"), 50, spacing="leading").rows
    deepest = max(i for i, row in enumerate(rows) if row.alpha <= LEVELS[20])
    assert same.steps_skipped == like.steps_skipped == deepest == 19  # as deep as this policy allows
    assert same.similarity == pytest.approx(1)
    assert like.similarity == pytest.approx(np.cos(np.deg2rad(20)))
    assert cache.stats("t").entries == 2
    assert cache.stats("t").counts["hit"] == 2


@pytest.mark.parametrize("fresh", [0.0, 0.3])
def test_a_prompt_asked_again_gets_pictures_of_their_own_where_the_policy_has_fresh_noise(
    cache: LatentCache, fresh: float
) -> None:
    cache.policy = replace(cache.policy, families={"solver": ((0.9, LEVELS[25]),)}, fresh={"solver": fresh})
    plan = build_plan("ddim", ToyModel().schedule("ddim"), 50, spacing="leading")
    # A latent at the level of a row, as plans of the calibrated sampler leave them: nothing else would re-noise it.
    latent = np.random.default_rng(0).standard_normal((CHANNELS, 4, 4)).astype(np.float16)
    first = asked("a")
    CacheStarts(cache, ToyModel(), "toy@1").keep(first, {plan.rows[24].alpha: latent})
    assert cache.flush(30)
    again = [asked(f"{seed}", prompt="a fox", seed=seed) for seed in range(10, 14)]
    pictures = draw(cache, *again, asked("n", prompt="a fox", n=4, seed=20))
    assert {image.cache_result for image in pictures} == {"hit"}
    different = {np.asarray(image.pixels).tobytes() for image in pictures}
    assert len(different) == (8 if fresh else 1)
    skipped = {image.steps_skipped for image in pictures}
    assert skipped == {24} if not fresh else max(skipped) < 24


def test_another_sampler_enters_at_its_own_row_under_its_own_policy(cache: LatentCache) -> None:
    _, euler, lcm = draw(cache, asked("a"), asked("b", sampler="euler", steps=20), asked("c", sampler="lcm", steps=8))
    assert (euler.cache_result, lcm.cache_result) == ("hit", "hit")
    for image, sampler, steps, deepest in ((euler, "euler", 20, LEVELS[20]), (lcm, "lcm", 8, LEVELS[10])):
        rows = build_plan(sampler, ToyModel().schedule(sampler), steps, spacing=CARD.samplers[sampler].spacing).rows
        assert rows[image.steps_skipped].alpha <= deepest < rows[image.steps_skipped + 1].alpha


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "u"},
        {"guidance_scale": 5.0},
        {"negative_prompt": "dull"},
        {"loras": (("ink", 0.5),)},
        {"width": 96},
    ],
)
def test_what_makes_another_picture_makes_another_space(cache: LatentCache, change: dict[str, object]) -> None:
    changed = asked("b", **change)  # type: ignore[arg-type]
    _, image, again = draw(cache, asked("a"), changed, replace(changed, id="c"))
    assert (image.cache_result, again.cache_result) == ("miss", "hit")


def test_another_file_of_a_loras_name_has_another_space(cache: LatentCache) -> None:
    plan = build_plan("ddim", ToyModel().schedule("ddim"), 50, spacing="leading")
    inked = asked("a", loras=(("ink", 0.5), ("moss", 1.0)))
    draw(cache, inked)

    def found(digests: dict[str, str]) -> bool:
        model = ToyModel(replace(CARD, lora_digests=digests))
        return CacheStarts(cache, model, "toy@1").find(inked, plan) != [None]

    assert found(dict(CARD.lora_digests))
    assert not found({**CARD.lora_digests, "ink": "3" * 64})


def test_guidance_that_is_near_shares_a_space(cache: LatentCache) -> None:
    assert draw(cache, asked("a"), asked("b", guidance_scale=3.2))[1].cache_result == "hit"


def test_another_model_of_the_same_name_has_another_space(cache: LatentCache) -> None:
    draw(cache, asked("a"))
    plan = build_plan("ddim", ToyModel().schedule("ddim"), 50, spacing="leading")
    assert CacheStarts(cache, ToyModel(), "toy@1").find(asked("b"), plan) != [None]
    assert CacheStarts(cache, ToyModel(), "toy@2").find(asked("b"), plan) == [None]


def test_pictures_of_one_request_start_from_different_entries(cache: LatentCache) -> None:
    for degrees in (0, 3):
        draw(cache, asked(f"at {degrees}", degrees=degrees, prompt=f"{degrees}", look=False))
    plan = build_plan("ddim", ToyModel().schedule("ddim"), 50, spacing="leading")
    found = CacheStarts(cache, ToyModel(), "toy@1").find(asked("b", degrees=1.5, n=2), plan)
    assert len({each.latent.tobytes() for each in found if each is not None}) == 2
    assert all(each.latent.shape == (CHANNELS, 4, 4) for each in found if each is not None)


@pytest.mark.parametrize(
    ("sampler", "steps"), [("ddim", 50), ("ddim", 25), ("euler", 20), ("dpmpp_2m", 10), ("lcm", 4), ("ddim", 1)]
)
def test_rows_at_or_before_five_levels_are_kept_and_every_inner_row_of_a_short_plan(
    cache: LatentCache, sampler: str, steps: int
) -> None:
    defaults = CARD.samplers[sampler]
    plan = build_plan(sampler, ToyModel().schedule(sampler), steps, spacing=defaults.spacing, karras=defaults.karras)
    marks = CacheStarts(cache, ToyModel(), "toy@1").marks(asked(), plan)
    if steps <= 8:
        assert marks == list(range(1, steps))
        return
    assert marks == sorted(set(marks))
    for level in LEVELS.values():
        row = max(i for i, row in enumerate(plan.rows) if row.alpha <= level)
        assert row in marks


def test_fifty_trailing_steps_of_ddim_keep_the_levels_themselves(cache: LatentCache) -> None:
    plan = build_plan("ddim", ToyModel().schedule("ddim"), 50, spacing="trailing")
    assert CacheStarts(cache, ToyModel(), "toy@1").marks(asked(), plan) == [5, 10, 15, 20, 25] == list(LEVELS)


def test_samplers_of_few_step_networks_have_a_policy_of_their_own() -> None:
    assert [family_of(name) for name in ("ddim", "dpmpp_2m", "lcm", "consistency")] == [
        "solver",
        "solver",
        "lcm",
        "consistency",
    ]
