"""95 % intervals of accuracies and of their differences, and the front of two aims; what results are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of a normal distribution, 97.5 % lie below
DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


def wilson(right: int, count: int) -> Interval:
    """Of a share of right answers (Wilson 1927); holds near 0 and 1, where the usual one has no width."""
    share, square = right / count, Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def resampled(scores: Sequence[Sequence[float]], seed: int = 0) -> np.ndarray:
    """Means [DRAWS] over tasks of the means of each task's scores, its prompts drawn anew each time.

    The draws depend on the numbers of scores and the seed alone: two policies on the same prompts are drawn in pairs.
    """
    generator, total = np.random.default_rng(seed), np.zeros(DRAWS)
    for part in scores:
        drawn = generator.integers(len(part), size=(DRAWS, len(part)))
        total += np.asarray(part, float)[drawn].mean(1)
    return total / len(scores)


def bootstrap(scores: Sequence[Sequence[float]], against: Sequence[Sequence[float]] | None = None) -> Interval:
    """Of the mean over tasks; ``against``: of the difference to scores of the same prompts."""
    means, mean = resampled(scores), float(np.mean([np.mean(part) for part in scores]))
    if against is not None:
        means, mean = means - resampled(against), mean - float(np.mean([np.mean(part) for part in against]))
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(mean, float(low), float(high))


def of_task(scores: Sequence[float]) -> Interval:
    """Of one task: Wilson's where each answer is right or wrong."""
    if all(score in (0, 1) for score in scores):
        return wilson(int(sum(scores)), len(scores))
    return bootstrap([scores])


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) that no other beats in both, from the cheapest on."""
    order, best, found = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])), -math.inf, []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found
