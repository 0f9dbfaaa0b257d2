"""A loaded model, its engine, and the bridge to it: what `serve` and `generate` both draw with."""

from __future__ import annotations

import secrets
import uuid

from models.diffusion.model import ModelCard
from service.bridge import Bridge
from service.config import EngineSettings
from service.diffusion.admission import resolve
from service.diffusion.request import MAX_SEED, Draft, ImageRequest


class Runtime:
    """Takes drafts and draws them. `bridge` must have been started."""

    def __init__(self, card: ModelCard, bridge: Bridge, limits: EngineSettings) -> None:
        self.card = card
        self.bridge = bridge
        self._limits = limits

    def resolve(self, draft: Draft) -> ImageRequest:
        """The draft checked and completed, with an id of its own. Raises InputError."""
        return resolve(draft, self.card, self._limits, id=uuid.uuid4().hex, random_seed=secrets.randbelow(MAX_SEED + 1))
