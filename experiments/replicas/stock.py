"""Dealers by stock: how many a pool of them needs, and how much lies in stock, for no pass to wait.

Owns the arithmetic, of a trace of what passes used. A dealer's seconds are the same whenever it deals, so a pool that
keeps up with the mean needs a stock for the bursts alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SPARE = 1.25  # of dealers, by what the mean load takes: else a stock would never fill again


@dataclass(frozen=True)
class Pool:
    """dealers: working all the time that the stock is not full. stock: bytes that the worst burst takes out of it."""

    dealers: int
    stock: float


def needed(dealt: Sequence[tuple[float, float, float]], seconds: float) -> Pool:
    """dealt: (when, seconds of a dealer, bytes), in any order. seconds: that the load lasts."""
    work = sum(took for _, took, _ in dealt)
    dealers = max(1, math.ceil(SPARE * work / seconds))
    rate = dealers * sum(size for _, _, size in dealt) / work if work else 0.0
    missing = most = last = 0.0
    for when, _, size in sorted(dealt):
        missing = max(0.0, missing - (when - last) * rate) + size
        most, last = max(most, missing), when
    return Pool(dealers, most)
