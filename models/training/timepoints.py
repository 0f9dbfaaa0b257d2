"""Time points of consistency sampling, found by search (Song et al. 2023, section 3 and appendix C)."""

import math
from collections.abc import Callable, Sequence

from models.training.schedule import karras

STEPS = (1, 2, 4, 8)
_ROUNDS = 4  # each leaves two thirds of the interval


def search(quality: Callable[[Sequence[float]], float], low: float, steps: int) -> list[float]:
    """The sigmas of a sampler of `steps` steps, noisiest first.

    Song et al. place each time point by ternary search, one after the other. So does this, from the noisiest to the
    cleanest, but starting from Karras' spacing and each between its neighbours: a point placed before the later ones
    are there would settle as if it were the last. The first is SIGMA_MAX, where pictures start.

    Args:
        quality: of the pictures drawn with some sigmas, the higher the better; best with the same prompts and seeds
            at every call. It is called 1 + 8 (steps - 1) times.
        low: sigma of the least noise.
    """
    best = karras(steps + 1, low)[:-1]
    score = quality(best)
    for index in range(1, steps):
        after = best[index + 1] if index + 1 < steps else low
        above, below = math.log(best[index - 1]), math.log(after)
        for _ in range(_ROUNDS):
            third = (above - below) / 3
            scores = []
            for place in (above - third, below + third):
                trial = [*best[:index], math.exp(place), *best[index + 1 :]]
                scores.append(quality(trial))
                if scores[-1] > score:
                    best, score = trial, scores[-1]
            above, below = (above, below + third) if scores[0] > scores[1] else (above - third, below)
    return best
