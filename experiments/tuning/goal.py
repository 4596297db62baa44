"""What a search is after: accuracy under a ceiling of cost, or low cost above a floor of accuracy; and when a policy
has no hope of it.

Owns the comparison of policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, mean
from typing import ClassVar

COSTS = {
    "bytes": "attention's bytes, of full's",
    "lan": "seconds a token on a LAN",
    "wan": "seconds a token on a WAN",
}


@dataclass(frozen=True)
class Tried:
    """A policy on all prompts of the search. cost: by the names in ``COSTS``."""

    policy: str
    accuracy: float
    cost: dict[str, float]


@dataclass(frozen=True)
class _Constraint:
    """what: the cost, a name in ``COSTS``."""

    what: str
    limit: float

    def is_met(self, tried: Tried, full: float) -> bool:
        return self.excess(tried, full) <= 0


@dataclass(frozen=True)
class Ceiling(_Constraint):
    """The most accurate policy that costs no more than ``limit``; of equally accurate ones the cheapest."""

    direction: ClassVar[str] = "maximize"

    def __str__(self) -> str:
        return f"{self.what} at most {self.limit:g}"

    def excess(self, tried: Tried, full: float) -> float:
        """By how much the constraint is missed; at 0 and below it is met. full: the full cache's accuracy."""
        return tried.cost[self.what] / self.limit - 1

    def rules_out(self, cost: dict[str, float], best: Tried | None) -> bool:
        """Whether a policy's cost alone rules it out. best: so far."""
        return cost[self.what] > self.limit

    def order(self, tried: Tried) -> tuple:
        """Least for the best."""
        return (-tried.accuracy, tried.cost[self.what])

    def objective(self, tried: Tried) -> float:
        return tried.accuracy

    def rival(self, full: Sequence[float], others: Sequence[Sequence[float]]) -> Sequence[float]:
        """Scores that must be within reach: those of the best other policy on the same prompts."""
        return max(others, key=mean, default=[0.0] * len(full))


@dataclass(frozen=True)
class Floor(_Constraint):
    """The cheapest policy whose accuracy is at least ``limit`` times that of the full cache."""

    direction: ClassVar[str] = "minimize"

    def __str__(self) -> str:
        return f"least {self.what}, accuracy at least {self.limit:g} of full's"

    def excess(self, tried: Tried, full: float) -> float:
        return self.limit * full - tried.accuracy

    def rules_out(self, cost: dict[str, float], best: Tried | None) -> bool:
        return best is not None and cost[self.what] > best.cost[self.what]

    def order(self, tried: Tried) -> tuple:
        return (tried.cost[self.what], -tried.accuracy)

    def objective(self, tried: Tried) -> float:
        return tried.cost[self.what]

    def rival(self, full: Sequence[float], others: Sequence[Sequence[float]]) -> Sequence[float]:
        """Scores that must be within reach: those of the full cache, as far as the floor asks."""
        return [self.limit * score for score in full]


Goal = Ceiling | Floor


def is_hopeless(scores: Sequence[float], rival: Sequence[float], confidence: float) -> bool:
    """Whether scores fall short of a rival's on the same prompts by more than chance explains.

    The one-sided upper bound of the mean difference, from the normal distribution after Agresti and Min (2005,
    Statistics in Medicine 24, for pairs of proportions): two pairs are added, half of one won and half of one lost
    among them, so that few prompts decide little.
    """
    differences = [a - b for a, b in zip(scores, rival, strict=True)]
    count = len(differences) + 2
    middle = sum(differences) / count
    variance = (sum(d * d for d in differences) + 1) / count - middle**2
    return middle + NormalDist().inv_cdf(confidence) * sqrt(variance / count) < 0
