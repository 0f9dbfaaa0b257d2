"""Prompts rewritten for the image model that draws them, in a tenant's name."""

from __future__ import annotations

from collections.abc import Callable

from models.rewriter.subjects import Vocabulary
from models.training.concepts import load_concepts
from service.llm.rewrite import CPU_BUDGET_S, GPU_BUDGET_S, Rewrite, Rewriter
from service.writer import Writer

WARM_UP_S = 60.0


class Rewriting:
    """One writer's rewriters.

    Args:
        fits: whether the image model reads all of a caption; called on the event loop.
        budget_s: after so many seconds a prompt stays as it is; None: what suits the writer's device.
    """

    def __init__(self, writer: Writer, fits: Callable[[str], bool], budget_s: float | None) -> None:
        self._writer, self._fits = writer, fits
        self._budget_s = budget_s or (GPU_BUDGET_S if writer.device.type == "cuda" else CPU_BUDGET_S)
        self._vocabulary = Vocabulary(load_concepts(), lambda word: len(writer.tokenizer.encode(f" {word}")) == 1)

    async def rewrite(self, prompt: str, namespace: str, budget_s: float | None = None) -> Rewrite:
        """The prompt rewritten, or why it was not. Tenants of different namespaces share nothing in memory."""
        author = self._writer.asked_by(namespace)
        return await Rewriter(author, self._vocabulary, self._fits, budget_s or self._budget_s).rewrite(prompt)

    async def warm_up(self, namespace: str) -> Rewrite:
        """Rewrite one prompt, with time: what all prompts begin with is in memory then."""
        return await self.rewrite("a cat", namespace, WARM_UP_S)
