"""The scorer: a dual encoder that embeds prompts and pictures and reads what a picture shows.

open_clip and what it imports take seconds, so import this package where a scorer is wanted, not at start-up.
"""

from models.scorer.frechet import Statistics, frechet
from models.scorer.loading import load_scorer
from models.scorer.scorer import Reading, Scorer

__all__ = ["Reading", "Scorer", "Statistics", "frechet", "load_scorer"]
