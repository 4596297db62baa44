"""Intervals: against the literature, against each other and against what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.tools.intervals import bootstrap, front, of_task, resampled, wilson


def test_wilson_against_published_values():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(right, total)
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
        assert found.mean == right / total


def test_a_bootstrap_finds_the_standard_error_of_a_mean():
    generator = np.random.default_rng(1)
    scores = [list(generator.normal(size=200)), list(3 + generator.normal(size=100))]
    found = bootstrap(scores)
    error = np.sqrt(np.var(scores[0]) / 200 + np.var(scores[1]) / 100) / 2
    assert found.mean == pytest.approx((np.mean(scores[0]) + np.mean(scores[1])) / 2)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_differences_are_taken_in_pairs():
    full = [[1, 0, 1, 1, 0, 1, 0, 1] * 5]
    same = bootstrap(full, full)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    worse = [[*full[0][:-8], 1, 0, 0, 1, 0, 0, 0, 1]]  # two answers of forty lost
    paired = bootstrap(worse, full)
    assert paired.mean == pytest.approx(-0.05)
    assert paired.high <= 0 and paired.high - paired.low < 0.15
    apart = np.quantile(resampled(worse, seed=1) - resampled(full, seed=2), (0.025, 0.975))
    assert apart[1] - apart[0] > 0.3


def test_a_task_of_partial_scores_has_a_bootstrap_interval():
    assert of_task([1, 0, 1, 1]) == wilson(3, 4)
    assert of_task([0.5, 0.25, 1.0]) == bootstrap([[0.5, 0.25, 1.0]])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_no_point_beats_one_of_the_front(points):
    best = front(points)
    for i, (cost, gain) in enumerate(points):
        beaten = any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)
        assert beaten or any(points[j] == (cost, gain) for j in best)
        assert not (beaten and i in best)
    assert [points[i][0] for i in best] == sorted(points[i][0] for i in best)
