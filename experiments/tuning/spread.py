"""Policies that are unlike those tried before, to begin a search with and to fall back on.

Owns the measure of novelty: how many pairs of settings have values that no tried policy has together. What two settings
do to each other is then seen early, also of values that few affordable policies have.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from itertools import combinations_with_replacement, islice

from eviction import parse
from experiments.tuning.space import Space

POOL = 32  # policies drawn at a time, of which the most novel comes first
POOLS = 8  # draws in a row after which there is nothing left to try


class Spread:
    def __init__(self, space: Space, seed: int):
        self._space, self._random = space, random.Random(seed)

    def points(self, known: Collection[str], tried: Collection[str]) -> Iterator[dict[str, int]]:
        """Points of policies that are not ``known``, drawn at random, the most novel beside ``tried`` first.

        ``known`` may grow meanwhile.
        """
        seen = {pair for policy in tried for pair in self._pairs(policy)}
        for _ in range(POOLS):
            pool = self._pool(known)
            novelty = {policy: len(self._pairs(policy) - seen) for policy in pool}
            yield from (pool[policy] for policy in sorted(pool, key=novelty.get, reverse=True))

    def _pool(self, known: Collection[str]) -> dict[str, dict[str, int]]:
        if (every := self._space.points) is not None:
            left = [policy for policy in every if policy not in known]
            return {policy: every[policy] for policy in self._random.sample(left, min(POOL, len(left)))}
        drawn = self._space.policies(islice(self._draws(), POOL))
        return {policy: point for policy, point in drawn.items() if policy not in known}

    def _draws(self) -> Iterator[dict[str, int]]:
        while True:
            yield {name: self._random.randrange(len(found)) for name, found in self._space.axes.items()}

    def _pairs(self, policy: str) -> set[tuple]:
        """Its settings two by two, and each by itself."""
        found = parse(policy)
        return set(combinations_with_replacement([(name, getattr(found, name)) for name in self._space.axes], 2))
