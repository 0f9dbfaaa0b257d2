"""Opens the latent cache of a loaded model as the settings say."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from tqdm import tqdm

from cache.latent.lookup import LatentCache
from cache.latent.policy import Policy, PolicyError, nirvana
from models.bundles.manifest import read_manifest
from models.bundles.registry import bundle_path
from models.diffusion.model import DiffusionModel, ModelCard
from models.errors import ModelError
from models.scorer.embedder import Embedder, load_embedder
from service.caching import CacheStarts, family_of, levels_of
from service.config import Settings
from service.errors import SetupError
from service.latents import Latents
from service.stores import identity, open_store, snapshots_of

log = logging.getLogger(__name__)

POLICY = Path("cache", "policy.json")  # in a model's folder
ENCODER = "text_encoder/model.safetensors"  # in a bundle


def open_latents(settings: Settings, model: DiffusionModel) -> tuple[Latents, CacheStarts] | None:
    """The model's cache, filled with what its store holds, as tenants and as the engine see it.

    None, and a line in the log, where there can be none.

    A store that cannot be opened now is no reason: the cache does without until it can.

    Raises:
        SetupError: the policy or the URL of the Redis server is none.
    """
    card = model.card
    policy = _policy(settings, model)
    found = None if policy is None else _embedder(settings, card)
    if policy is None or found is None:
        return None
    embedder, origin = found
    name = identity(card.name, card.revision, Path(card.source))
    begun = time.monotonic()
    with tqdm(desc="cache", unit=" entries", leave=False, disable=None) as bar:

        def progress(read: int, total: int) -> None:
            bar.total = total
            bar.update(read - bar.n)

        cache = LatentCache(
            open_store(settings, name),
            settings.cache.budget_bytes,
            policy,
            ttl_s=dict(settings.cache.ttl_s),
            snapshots=snapshots_of(settings, name),
            progress=progress,
        )
    totals = cache.totals()
    log.info("cache: %d entries, read in %.1f s, policy: %s", totals.entries, time.monotonic() - begun, policy.source)
    latents = Latents(
        cache, lambda prompt, namespace: embedder.embed([prompt], namespace)[0], shared=settings.cache.shared
    )
    return latents, CacheStarts(cache, model, f"{name}+{origin}" if origin else name)


def _policy(settings: Settings, model: DiffusionModel) -> Policy | None:
    """The policy of the settings, else the model's own, else NIRVANA's; says in the log what it does not cover."""
    card = model.card
    if card.max_prompt_tokens is None:
        log.info("no cache: %s takes no prompts", card.name)
        return None
    own = Path(card.source) / POLICY
    path = settings.cache.policy or (own if own.is_file() else None)
    if path is not None:
        try:
            policy = Policy.load(path)
        except PolicyError as error:
            raise SetupError(f"cache.policy: {error}", param="cache.policy") from None
        except OSError as error:
            raise SetupError(f"cache.policy: {path}: cannot be read: {error.strerror}", param="cache.policy") from None
    elif any(family_of(sampler) == "solver" for sampler in card.samplers):
        policy = nirvana(levels_of(model))
        log.warning("cache: %s comes without a policy of its own; the published thresholds are used", card.name)
    else:
        log.warning("no cache: there is no policy for %s, and the published thresholds are not for it", card.name)
        return None
    bare = [sampler for sampler in card.samplers if not policy.families.get(family_of(sampler))]
    if bare:
        log.info("cache: the policy is silent on %s: those pictures are drawn from scratch", ", ".join(sorted(bare)))
    return policy


def _embedder(settings: Settings, card: ModelCard) -> tuple[Embedder, str] | None:
    """The text side of the model's scorer, else the plain text encoder of the default bundle.

    With it, what tells its embeddings from those of another of the same width: "" where the model's own identity does.
    """
    home = Path(card.source)
    try:
        if (home / "scorer").is_dir():
            return load_embedder(home / "scorer", home / "text_encoder", home / "tokenizer"), ""
        bundle = bundle_path("default", settings.model.cache_dir)
        digests = {file.path: file.sha256 for file in read_manifest(bundle).files}
        return load_embedder(None, bundle / "text_encoder", bundle / "tokenizer"), digests[ENCODER][:12]
    except ModelError as error:
        log.warning("no cache: prompts cannot be compared: %s", error)
        return None
