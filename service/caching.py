"""The latent cache as the engine sees it: the key space of a request, what it can start from, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from accel.samplers.library import SAMPLERS, build_plan, entry_row
from accel.samplers.plans import Plan
from cache.latent.keys import KeySpace, guidance_bucket
from models.diffusion.model import DiffusionModel
from service.diffusion.request import CacheIntent, ImageRequest
from service.diffusion.starts import Start

if TYPE_CHECKING:  # importing it loads faiss
    from cache.latent.lookup import LatentCache

KEPT = (5, 10, 15, 20, 25)  # steps of 50 after which NIRVANA (arXiv 2312.04429) keeps a latent
FEW_STEPS = 8  # a plan of so many rows or fewer keeps every inner one


class CacheStarts:
    """Implements `service.diffusion.starts.Starts` with one model's latents.

    Args:
        identity: tells the model's latents, and the embeddings of their prompts, from any other's.
    """

    def __init__(self, cache: LatentCache, model: DiffusionModel, identity: str) -> None:
        self._cache = cache
        self._card = model.card
        self._identity = identity
        self._levels = tuple(levels_of(model).values())

    def find(self, request: ImageRequest, plan: Plan) -> list[Start | None]:
        rows = [row.alpha for row in plan.rows]
        space, embedding = self._space(request), _embedding(_intent(request))
        found = self._cache.find(space, embedding, family_of(request.sampler), rows, request.n, request.seed)
        return [each and Start(each.latent, each.alpha, each.similarity, each.row) for each in found]

    def marks(self, request: ImageRequest, plan: Plan) -> list[int]:
        return kept_rows(plan, self._levels)

    def keep(self, request: ImageRequest, latents: Mapping[float, np.ndarray]) -> None:
        self._cache.insert(self._space(request), request.prompt, _embedding(_intent(request)), latents)

    def _space(self, request: ImageRequest) -> KeySpace:
        card = self._card
        return KeySpace(
            tenant=request.tenant,
            model=self._identity,
            family=SAMPLERS[request.sampler].schedule,
            # By content: tomorrow another file may have the name.
            loras=tuple(sorted((card.lora_digests[name], scale) for name, scale in request.loras)),
            shape=(card.latent_channels, request.height // card.scale, request.width // card.scale),
            guidance=guidance_bucket(request.guidance_scale),
            negative_prompt=request.negative_prompt,
        )


def kept_rows(plan: Plan, levels: Iterable[float]) -> list[int]:
    """Every inner row of a short plan; of a longer one, those at the levels (alphas) of KEPT, or just before them.

    Before, because a policy's bins end at these levels: a latent just past one would count as the next deeper.
    """
    if len(plan) <= FEW_STEPS:
        return list(range(1, len(plan)))
    return sorted({entry_row(plan.rows, level) for level in levels} - {0})


def levels_of(model: DiffusionModel) -> dict[int, float]:
    """The signal scale alpha of a latent after K of 50 trailing DDIM steps, for each K of KEPT, of a latent model."""
    sampler = next(name for name in model.card.samplers if SAMPLERS[name].schedule == "discrete")
    rows = build_plan("ddim", model.schedule(sampler), 50, spacing="trailing").rows
    return {k: rows[k].alpha for k in KEPT}


def family_of(sampler: str) -> str:
    """The name under which a policy speaks of a sampler: those of few-step networks have their own."""
    return sampler if sampler in ("lcm", "consistency") else "solver"


def _intent(request: ImageRequest) -> CacheIntent:
    assert request.cache is not None
    return request.cache


def _embedding(intent: CacheIntent) -> NDArray[np.float32]:
    return cast(NDArray[np.float32], intent.embedding)
