"""NIRVANA's match predictor: skips the lookup of a prompt that is unlike those that matched lately.

It pays where a lookup is slow (an index on another machine). A skipped prompt that would have matched is drawn from
scratch, so it can cost far more than it saves; bench/cache_predictor.py measures both.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

_NU = 0.2  # least share of the sample that becomes supports: few supports follow single embeddings too closely


@dataclass(frozen=True, slots=True)
class _Boundary:
    """A trained classifier: sum_i weights_i exp(-gamma |x - supports_i|^2) >= threshold for what may match."""

    supports: Vectors  # [S, D]
    weights: Vectors  # [S]
    gamma: float
    threshold: float

    def score(self, embedding: Vectors) -> float:
        distances = np.square(self.supports - embedding).sum(axis=1)
        return float(self.weights @ np.exp(-self.gamma * distances))

    def holds(self, embedding: Vectors) -> bool:
        return self.score(embedding) >= self.threshold


class MatchPredictor:
    """One key space's one-class support vector machine (Schölkopf et al. 2001), trained on embeddings that matched.

    Lookups of one tenant must not depend on another's, so each key space has a predictor of its own.

    capacity: embeddings of the latest matches that it is trained on.
    every: matches between two trainings, which run in a thread of their own.
    wrong: share of matching prompts that it may take for others, as far as a quarter of the sample that it is not
        trained on can tell.
    explore: share of prompts let through whatever it says. A match among them counts 1/explore times in training, for
        all those that were not: otherwise each training would shrink to what the last one let through.
    """

    def __init__(
        self, *, capacity: int = 1024, every: int = 256, wrong: float = 0.05, explore: float = 0.05, seed: int = 0
    ) -> None:
        self._capacity, self._every, self._wrong, self._explore = capacity, every, wrong, explore
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._recent: Vectors | None = None  # [capacity, D], a ring
        self._weights = np.empty(capacity, np.float32)
        self._seen = 0
        self._boundary: _Boundary | None = None
        self._training: threading.Thread | None = None

    def may_match(self, embedding: Vectors) -> bool:
        """embedding: [D]. True until the first training."""
        boundary = self._boundary
        if boundary is None or boundary.holds(embedding):
            return True
        with self._lock:
            return bool(self._random.random() < self._explore)

    def matched(self, embedding: Vectors) -> None:
        """A lookup of this embedding [D] found something."""
        boundary = self._boundary
        explored = boundary is not None and not boundary.holds(embedding)
        with self._lock:
            if self._recent is None:
                self._recent = np.empty((self._capacity, len(embedding)), np.float32)
            self._recent[self._seen % self._capacity] = embedding
            self._weights[self._seen % self._capacity] = 1 / self._explore if explored and self._explore else 1
            self._seen += 1
            if self._seen % self._every == 0 and self._training is None:
                sample = self._recent[: self._seen].copy(), self._weights[: self._seen].copy()
                self._training = threading.Thread(target=self._train, args=sample, name="predictor", daemon=True)
                self._training.start()

    def settle(self, timeout_s: float) -> bool:
        """Waits for a training under way; False if it still is."""
        training = self._training
        if training is not None:
            training.join(timeout_s)
        return training is None or not training.is_alive()

    def _train(self, sample: Vectors, weights: Vectors) -> None:
        from sklearn.svm import OneClassSVM  # takes a second to import, and few need it

        held_out = np.arange(len(sample)) % 4 == 3
        gamma = 1.0 / max(float(sample.var()) * sample.shape[1], 1e-6)
        try:
            machine: Any = OneClassSVM(nu=_NU, gamma=gamma).fit(sample[~held_out], sample_weight=weights[~held_out])
            boundary = _Boundary(
                supports=machine.support_vectors_.astype(np.float32),
                weights=machine.dual_coef_[0].astype(np.float32),
                gamma=gamma,
                threshold=0.0,
            )
            # The machine's own threshold is too strict: what it was trained on supports itself, what is new does not.
            scores = np.array([boundary.score(embedding) for embedding in sample[held_out]])
            order = np.argsort(scores)
            below = np.cumsum(weights[held_out][order])
            place = np.searchsorted(below, self._wrong * below[-1])
            self._boundary = replace(boundary, threshold=float(scores[order][place]))
        finally:
            self._training = None
