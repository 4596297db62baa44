"""The search of tuning: the grid's best is found, by fewer answers, on scores made up and on scores measured."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from optuna.trial import TrialState
from tune_runs import make_up, opened, search

from crypten_llm.errors import UsageError
from eviction.settings import written
from experiments import tune
from experiments.tuning import measure as tune_measure
from experiments.tuning.goal import Ceiling, Floor
from experiments.tuning.measure import Bench, draw_prompts
from experiments.tuning.report import beside, draw, result, text
from experiments.tuning.search import Search
from experiments.tuning.space import space

RESULTS = Path(tune.__file__).parent / "results" / "tune"


@pytest.fixture
def made_up(monkeypatch):
    make_up(monkeypatch.setattr)


@pytest.mark.parametrize("goal", [Ceiling("bytes", 0.12), Floor("bytes", 0.85)], ids=str)
def test_the_search_finds_what_the_grid_finds(made_up, tmp_path, goal):
    with opened(tmp_path) as store:
        some = search(tmp_path, store, goal)
        some.run(30)
        every = search(tmp_path, store, goal, exhaustive=True, name="grid", batch=48)
        every.run(len(every.space.points))
        found, grid = result(some, 3), result(every, 3)
    assert grid["saving"]["pairs"] == 96 * 48 == grid["saving"]["grid_pairs"] and grid["saving"]["grid_is_exact"]
    assert found["saving"]["pairs"] < grid["saving"]["pairs"] / 3
    assert found["leaders"] == [tried.policy for tried in some.ranked()[:3]] and found["best"] in found["leaders"]
    most = max(row["accuracy"] for row in grid["policies"])
    assert next(row for row in grid["policies"] if row["policy"] == grid["front"][-1])["accuracy"] == most
    best, wanted = some.best(), every.best()
    assert goal.objective(best) == goal.objective(wanted)
    stopped = [row for row in found["policies"] if 0 < row["prompts"] < 48]
    ruled_out = [row for row in found["policies"] if not row["prompts"]]
    assert len(stopped) > 3 and len(ruled_out) > 3
    _check_pages(tmp_path, found | {"title": "made up"}, grid | {"title": "grid"}, goal)


def _check_pages(folder, found, grid, goal):
    page = text(found)
    assert f"Best: `{found['best']}`" in page and f"`{found['best']}` **best**" in page
    assert (
        f"{found['saving']['pairs']:,} (prompt, policy) pairs; the full grid of the same values has 96 policies" in page
    )
    both = beside(found, grid)
    assert f"| search | {found['saving']['pairs']:,} |" in both and "| full grid | 4,608 | 96 |" in both
    draw(found, goal, folder / "picture.png")
    assert (folder / "picture.png").stat().st_size > 20_000


def test_cost_rules_policies_out_before_their_first_prompt(made_up, tmp_path):
    goal = Ceiling("bytes", 0.05)
    with opened(tmp_path) as store:
        some = search(tmp_path, store, goal)
        some.run(8)
        met = [outcome for outcome in some.outcomes() if outcome.prompts]
        dear = [outcome for outcome in some.outcomes() if not outcome.prompts]
        assert len(met) == 8 and all(outcome.cost["bytes"] <= 0.05 for outcome in met)
        assert dear and all(outcome.cost["bytes"] > 0.05 for outcome in dear)
        assert all(store.score(some.prompts.searched[0].name, outcome.policy) is None for outcome in dear)
        found = result(search(tmp_path, store, Ceiling("bytes", 1e-4), name="impossible"), 2)
    assert found["best"] is None
    assert "No policy of the search meets the goal (bytes at most 0.0001)" in text(found | {"title": "none"})


def test_the_sampler_learns_from_policies_that_met_a_prompt_alone(made_up, tmp_path):
    """And one that fell short of a floor does not count as good for being inaccurate."""
    with opened(tmp_path) as store:
        for goal in (Ceiling("bytes", 0.1), Floor("bytes", 0.85)):
            some = search(tmp_path, store, goal, name=str(goal))
            some.run(24)
            told = [trial for trial in some.study.trials() if trial.state != TrialState.FAIL]
            assert {trial.user_attrs["policy"] for trial in told} == {
                outcome.policy for outcome in some.outcomes() if outcome.prompts
            }
            assert any(not outcome.prompts for outcome in some.outcomes())
            stopped = [trial for trial in told if trial.state == TrialState.PRUNED]
            assert stopped and all((trial.constraints["goal"] > 0) == isinstance(goal, Floor) for trial in stopped)


def test_a_space_that_is_used_up_ends_the_search(made_up, tmp_path):
    with opened(tmp_path) as store:
        some = search(tmp_path, store, Ceiling("bytes", 2.0), axes=["static=0.3,0.5,1", "summary=minmax,mean"])
        some.run(50)
        assert len(some.outcomes()) == 6


def test_another_setup_is_refused(made_up, tmp_path):
    with opened(tmp_path) as store:
        search(tmp_path, store, Ceiling("bytes", 0.1), setup={"seed": 0, "tasks": ("passkey",)})
        search(tmp_path, store, Ceiling("bytes", 0.1), setup={"seed": 0, "tasks": ("passkey",)})
        with pytest.raises(UsageError, match="'made up' .* was begun with another tasks; go on as it was begun"):
            search(tmp_path, store, Ceiling("bytes", 0.1), setup={"seed": 0, "tasks": ("two_hop",)})


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_the_best_of_a_measured_grid_is_found_with_a_quarter_of_its_answers(monkeypatch, tmp_path, seed):
    grid = json.loads((RESULTS / "mpcache_bytes_at_most_0.3_grid.json").read_text())
    setup = grid["setup"]
    drawn = {name: setup[name] for name in ("model", "tasks", "lengths", "samples", "seed")}
    shutil.copy(RESULTS / "measured.jsonl", tmp_path)
    for name in ("Evaluator", "count"):
        monkeypatch.setattr(tune_measure, name, None)  # all is there
    monkeypatch.setattr(os, "fsync", lambda file: None)
    axes = [f"{name}={','.join(map(written, found))}" for name, found in setup["space"]["axes"].items()]
    with opened(tmp_path) as store:
        how = (Ceiling("bytes", 0.3), Bench(store, "shipped", max(setup["lengths"]), workers=1))
        given = (draw_prompts(**drawn, fresh=0), setup["confidence"], setup["batch"], seed)
        some = Search(tmp_path, "again", {}, space("mpcache", axes), *how, *given)
        some.run(36)
        pairs = sum(outcome.prompts for outcome in some.outcomes())
    assert some.best().policy == grid["leaders"][0] and pairs < grid["saving"]["pairs"] / 4
