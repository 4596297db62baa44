"""The goals of tuning: how they order policies, and when a policy is stopped."""

from __future__ import annotations

import random
from statistics import mean

import pytest

from experiments.tuning.goal import Ceiling, Floor, Tried, is_hopeless


@pytest.mark.parametrize("lost, hopeless", [(0, False), (3, False), (4, True), (14, True)])
def test_few_prompts_decide_little(lost, hopeless):
    assert is_hopeless([0.0] * lost + [1.0] * (14 - lost), [1.0] * 14, 0.95) == hopeless
    assert not is_hopeless([1.0] * 14, [0.0] * 14, 0.95) and not is_hopeless([0.0], [1.0], 0.95)


def test_stopping_a_policy_that_is_as_good_is_as_rare_as_promised():
    """Two policies that are right in 80 % of 30 prompts, each by itself: 5 % of 2,000, and three deviations."""
    draws = random.Random(0)
    pairs = [[[float(draws.random() < 0.8) for _ in range(30)] for _ in range(2)] for _ in range(2_000)]
    assert mean(is_hopeless(a, b, 0.95) for a, b in pairs) <= 0.05 + 3 * 0.005


def tried(policy, accuracy, cost):
    return Tried(policy, accuracy, {"bytes": cost})


def test_goals_order_policies():
    a, b, c = tried("a", 0.9, 0.3), tried("b", 0.9, 0.2), tried("c", 0.5, 0.1)
    ceiling, floor = Ceiling("bytes", 0.25), Floor("bytes", 0.99)
    assert sorted([c, a, b], key=ceiling.order) == [b, a, c] and sorted([a, b, c], key=floor.order) == [c, b, a]
    assert not ceiling.is_met(a, 1.0) and ceiling.is_met(b, 1.0) and ceiling.excess(a, 1.0) == pytest.approx(0.2)
    assert ceiling.rules_out(a.cost, None) and not ceiling.rules_out(b.cost, c)
    assert floor.is_met(a, 0.9) and not floor.is_met(c, 0.9) and floor.excess(c, 0.9) == pytest.approx(0.391)
    assert floor.rules_out(a.cost, b) and not floor.rules_out(b.cost, b) and not floor.rules_out(a.cost, None)
    assert ceiling.rival([1, 1], [[0, 1], [0, 0]]) == [0, 1] and floor.rival([1, 0], [[1, 1]]) == [0.99, 0]
