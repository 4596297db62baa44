"""Predicted seconds beside measured ones: constants come back out of what they made, and a run that goes on."""

import json
import sys

import pytest

from crypten_llm.commands.machine import Machine
from crypten_llm.session.bench import Shape
from experiments.measure import predicted_seconds
from experiments.measure.predicted_seconds import Point, counted, fit, measured_bench

TINY = Shape(hidden=32, heads=4, kv_heads=2, ffn=48, layers=1, kv_len=20, steps=2)
MADE_OF = Machine(round=2e-4, product=3e-10, material=5e-9, deal=0.0)
COUNTS = [(22.0, 3e6, 5e5), (700.0, 1.4e8, 1e7), (100.0, 2e9, 1e6), (60.0, 1e8, 3e8)]


def points(machine: Machine, error: float = 0.0) -> list[Point]:
    made = [Point(str(counts), 1.0, counts) for counts in COUNTS]
    signs = [1 - error if i % 2 else 1 + error for i in range(len(made))]
    return [Point(p.name, sign * p.predicted(machine), p.counts) for p, sign in zip(made, signs, strict=True)]


def test_constants_come_back():
    found = fit(points(MADE_OF))
    assert [getattr(found, name) for name in ("round", "product", "material")] == pytest.approx([2e-4, 3e-10, 5e-9])


def test_no_constant_is_below_zero():
    """What took less the more rounds it had would have them give time back."""
    made = [
        Point("few", 1.0, (1.0, 1e9, 0.0)),
        Point("many", 0.5, (1e4, 1e9, 0.0)),
        Point("some", 0.7, (5e3, 1e9, 0.0)),
    ]
    found = fit(made)
    assert (found.round, found.material) == (0.0, 0.0) and found.product == pytest.approx(6.5e-10, rel=0.1)


def test_errors_are_relative():
    """A run of a second counts as much as one of an hour: neither is off by more than it was made."""
    made = points(MADE_OF, 0.1)
    assert all(point.predicted(fit(made)) / point.seconds == pytest.approx(1, abs=0.21) for point in made)


def test_what_is_counted_is_a_step():
    """Twice the steps, the same counts; every constant is in them."""
    once, twice = (counted(Shape(32, 4, 2, 48, 1, 20, steps))["decode"] for steps in (2, 4))
    assert once == pytest.approx(twice) and all(once)


def test_a_run_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    """A real run of a tiny shape, kept; the second time only what is missing is measured."""
    done = []

    def measured(shape, folder):
        done.append(shape)
        return measured_bench(shape, folder)

    monkeypatch.setattr(predicted_seconds, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(predicted_seconds, "PROMPTS", ())
    monkeypatch.setattr(predicted_seconds, "measured_bench", measured)
    path = tmp_path / "seconds.json"
    for repeats in ("1", "1", "2"):
        monkeypatch.setattr(sys, "argv", ["predicted_seconds", "--repeats", repeats, "--json", str(path)])
        predicted_seconds.main()
    assert len(done) == 2 and len(json.loads(path.read_text())["runs"]["tiny"]) == 2
    assert "Machine(round=" in capsys.readouterr().out
