"""Faults under load: the harness, for a minute of each kind of fault, and that it finds a wrong answer."""

import pytest

from experiments.measure import faults


@pytest.mark.slow
def test_no_fault_leaves_a_wrong_answer_or_a_wait():
    rows = faults.run(60.0, list(faults.KINDS), timeout=20.0, seed=3)
    assert [row["fault"] for row in rows] == list(faults.KINDS)
    assert all(row["faults"] >= 1 and row["wrong"] == 0 for row in rows)


@pytest.mark.slow
def test_a_wrong_answer_is_found():
    expected = dict.fromkeys(faults.PROMPTS, "another")
    load = faults.one("shipped", expected, "cut", seed=5, timeout=20.0)
    assert load.answered and "and 'another' is right" in load.wrong[0]
