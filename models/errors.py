"""What loading and running weights can say to a user."""

from __future__ import annotations


class ModelError(Exception):
    """Weights are missing, damaged or of a kind that is not served. The message is one line, fit for a user."""


class LoraError(ModelError):
    """A LoRA file that does not fit the model it was given to."""


class PromptError(ModelError):
    """Messages that a language model cannot be given."""


class PatchError(ModelError):
    """A picture that cannot be shared out among so many ranks, and what would work."""
