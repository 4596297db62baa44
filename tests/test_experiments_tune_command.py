"""The command ``tune``: its pages, the grid beside the search, and arguments that mean nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

import pytest
from tune_runs import AXES, QUICK, make_up

from crypten_llm.models.checkpoint import load_tokenizer
from crypten_llm.session.bench import Shape
from experiments import tune
from experiments.measure.eviction_counts import count
from experiments.measure.quality import Evaluator
from experiments.tasks import find
from experiments.tuning import measure as tune_measure


def _main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    tune.main()
    return capsys.readouterr().out


def test_the_command_measures_what_quality_and_cost_measure(monkeypatch, capsys, tmp_path):
    page = _main(monkeypatch, capsys, *QUICK, "--out", str(tmp_path))
    name = tmp_path / "snapkv_bytes_at_most_0.9"
    found = json.loads(Path(f"{name}.json").read_text())
    assert Path(f"{name}.md").read_text() == page and Path(f"{name}.png").stat().st_size > 20_000
    assert {row["policy"]: row["how"] for row in found["policies"]}[
        "snapkv(budget=1,window=8)"
    ] == "ruled out by its cost"
    row = next(row for row in found["policies"] if row["policy"] == "snapkv(budget=0.3,window=8)")
    examples = find("passkey").examples(load_tokenizer("shipped"), 64, 6)
    with Evaluator(workers=1) as evaluator:
        scores = [found["score"] for found in evaluator.rows(examples, [row["policy"]])]
    assert row["prompts"] == 4 and row["accuracy"] == mean(scores[:4])
    shown = next(shown for shown in found["shown"] if shown["policy"] == row["policy"])
    assert shown["accuracy"]["mean"] == mean(scores[4:])
    shape = Shape(hidden=256, heads=8, kv_heads=4, ffn=704, layers=6, kv_len=64, policy=row["policy"])
    step, full = count(shape), count(Shape(256, 8, 4, 704, 6, 64))
    both = [float(found.total("online") + found.total("dealer")) for found in (step, full)]
    assert row["bytes"] == both[0] / both[1] and shown["rounds"] == float(step.total("rounds"))
    assert row["wan"] == step.seconds("wan") and found["provenance"]["machine"]
    # Again: nothing is left to measure.
    monkeypatch.setattr(tune_measure, "Evaluator", None)
    monkeypatch.setattr(tune_measure, "count", None)
    assert _main(monkeypatch, capsys, *QUICK, "--out", str(tmp_path)) == page


def test_the_grid_by_itself_and_beside_the_search(monkeypatch, capsys, tmp_path):
    make_up(monkeypatch.setattr)
    arguments = ["--search", *AXES[:2], "--max-bytes", "0.3", "--tasks", "passkey", "--lengths", "64"]
    arguments += ["--samples", "24", "--fresh", "8", "--policies", "16", "--out", str(tmp_path)]
    grid = _main(monkeypatch, capsys, *arguments, "--grid")
    name = tmp_path / "mpcache_bytes_at_most_0.3"
    assert Path(f"{name}_grid.md").read_text() == grid and not Path(f"{name}.md").exists()
    assert "beside the full grid" not in grid and Path(f"{name}_grid.png").exists()
    search = _main(monkeypatch, capsys, *arguments)
    assert "\n\n## The search beside the full grid" in search
    found, all_of_it = (json.loads(Path(f"{name}{ending}.json").read_text()) for ending in ("", "_grid"))
    assert found["leaders"][0] == all_of_it["leaders"][0]
    assert found["saving"]["pairs"] < all_of_it["saving"]["pairs"] == 4 * 4 * 24


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max-bytes", "0"], "--max-bytes is 0; it must be above 0"),
        (["--max-bytes", "0.2", "--grid"], "the grid has 92,160,000 points; name fewer settings"),
        (["--max-bytes", "0.2", "--tasks", "stories"], "task stories has a loss and no score between 0 and 1"),
        (["--max-bytes", "0.2", "--tasks", "pasky"], "unknown task 'pasky'"),
    ],
)
def test_commands_that_mean_nothing(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setattr(sys, "argv", ["tune", *arguments, "--out", str(tmp_path)])
    assert tune.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
