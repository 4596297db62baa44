"""Tuning: what is searched, when a policy is stopped, that the grid's best is found, and runs that were killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean

import pytest
from optuna.trial import TrialState

from crypten_llm.errors import UsageError
from crypten_llm.models.checkpoint import load_tokenizer
from crypten_llm.session.bench import Shape
from eviction import POLICIES, Policy, parse, settings
from eviction.settings import written
from experiments import tune
from experiments.measure.eviction_counts import count
from experiments.measure.quality import Evaluator
from experiments.tasks import Example, find
from experiments.tools.processes import processes
from experiments.tuning import measure as tune_measure
from experiments.tuning.goal import Ceiling, Floor, Tried, is_hopeless
from experiments.tuning.measure import FULL, Bench, Prompt, Prompts, draw_prompts
from experiments.tuning.report import beside, draw, result, text
from experiments.tuning.search import Search
from experiments.tuning.space import space, values
from experiments.tuning.spread import POOL, Spread
from experiments.tuning.store import Measured, name_of
from experiments.tuning.study import locked

RESULTS = Path(tune.__file__).parent / "results" / "tune"
AXES = ("static=0.1,0.3,0.5,1", "second=0.05,0.1,0.3,0.5", "fine=8,16,32", "summary=minmax,mean")  # 96 policies


# What is searched.


@dataclass(frozen=True)
class Kinds(Policy):
    part: float = settings.share(0.25)
    rows: float = settings.budget(2048)
    block: int = settings.whole(32, 2)
    layers: int = settings.whole(2, 0)
    bits: int = settings.whole(4, 2, 8)
    weight: float = settings.number(0.6, 0.0, 1.0)
    key: str = settings.one_of("mean", "most", "mean", "least")
    pairs: bool = settings.switch(True)
    file: str = settings.text("shipped")

    name = "kinds"


def test_values_follow_from_the_settings():
    assert {setting.name: values(setting) for setting in fields(Kinds)} == {
        "part": (0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.75, 1.0),
        "rows": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),  # the default counts tokens
        "block": (8, 16, 32, 64, 128),
        "layers": (0, 1, 2, 4, 8),
        "bits": (2, 4, 8),
        "weight": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        "key": ("most", "mean", "least"),
        "pairs": (False, True),
        "file": (),
    }


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"full"}))
def test_every_policy_can_be_tuned(name):
    found = space(name)
    assert set(found.axes) | set(found.held) == {setting.name for setting in fields(POLICIES[name])}
    text = found.policy({axis: len(found.axes[axis]) - 1 for axis in found.axes if axis != "kernel"} | _odd(found))
    assert str(parse(text)) == text and parse(text).name == name
    assert parse(found.untuned).name == name


def _odd(found):
    return {"kernel": found.axes["kernel"].index(5)} if "kernel" in found.axes else {}


def test_what_is_held_and_what_is_named():
    whole = space("mpcache")
    assert {"static", "window", "alpha", "coarse", "fine", "second", "summary", "share", "alone"} <= set(whole.axes)
    assert set(POLICIES["mpcache"].held) == set(whole.held) and whole.held["least"] == 0
    assert whole.policy(whole.default()) == whole.untuned == "mpcache(least=0)"
    part = space("mpcache(summary=mean)", ["static=0.6,0.25", "share_from"], ["coarse=128"])
    assert part.axes == {"static": (0.25, 0.6), "share_from": (0, 1, 2, 4, 8)}
    text = part.policy({"static": 0, "share_from": 3})
    assert text == "mpcache(static=0.25,coarse=128,least=0,summary=mean,share_from=4)"
    assert space("mpcache", held=["least=384"]).held["least"] == 384


def test_points_without_a_difference_are_one():
    """Fine clusters above coarse ones are refused; alpha is nothing to the mean key, the window to a whole cache."""
    found = space("mpcache", ["coarse=8,32", "fine=8,16", "alpha=0.2,0.8", "summary=minmax,mean"])
    assert found.size == 16 and len(found.points) == 3 * 3
    assert all(found.policy(point) == text for text, point in found.points.items())
    mean_key = found.policy({"coarse": 0, "fine": 0, "alpha": 0, "summary": found.axes["summary"].index("mean")})
    assert mean_key == "mpcache(coarse=8,fine=8,least=0,summary=mean)"
    static = space("mpcache", ["static=0.5,1", "second=0.5,1", "window=0.1,0.2", "share=false,true", "alpha=0.1,0.5"])
    assert len(static.points) == 2 * 2 * 2 + 2 * 2 + 2 + 1  # by (static, second): both, static, second, neither at 1
    assert space("mpcache").points is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("full",), "policy full has no setting to search; tune another one"),
        (("mpcache", ["statc"]), "no setting 'statc' to search; did you mean 'static'?"),
        (("mpcache", ["static=0.1,2.5"]), "each value must be tokens (a whole number above 1) or a share"),
        (("mpcache", ["static"], ["static=0.1"]), "static: held at a value and to be searched"),
        (("locret", ["weights"]), "no values to try by themselves; write weights=value,value"),
        (("mpcash",), "unknown policy 'mpcash'; did you mean 'mpcache'?"),
    ],
)
def test_spaces_that_there_are_not(arguments, message):
    with pytest.raises(UsageError) as error:
        space(*arguments)
    assert message in str(error.value)


def test_what_is_unlike_the_policies_tried_comes_first():
    found = space("mpcache", ["static=0.3,0.5", "fine=8,16", "summary=minmax,mean"])
    tried = [text for text in found.points if "summary=mean" not in text and "static=0.3" not in text]
    first, *rest = [found.policy(point) for point in Spread(found, 0).points(set(tried), tried)][:6]
    assert "static=0.3" in first and "summary=mean" in first and {first, *rest} == found.points.keys() - set(tried)
    assert list(Spread(found, 0).points(found.points.keys(), tried)) == []
    alone = space("mpcache", ["static=0.3,0.5,1"])
    assert len(list(islice(Spread(alone, 0).points({alone.untuned}, [alone.untuned]), 2))) == 2
    large = space("mpcache")
    points = list(islice(Spread(large, 0).points(set(), []), 2 * POOL // 3))
    assert len({large.policy(point) for point in points}) == len(points)


# Goals and statistics.


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


# The store.


@contextmanager
def opened(folder):
    with locked(folder):
        yield Measured(folder / "measured.jsonl", "shipped")


def test_what_was_measured_outlives_a_torn_line(tmp_path):
    with opened(tmp_path) as store:
        store.add_scores("p", {"a": 1.0, "b": 0.5})
        store.add_cost("a", 512, {"rounds": 3.0})
    path = tmp_path / "measured.jsonl"
    with path.open("a") as file:
        file.write('{"prompt": "q", "sco')
    with opened(tmp_path) as store:
        assert store.scores("a", ["p"]) == [1.0] and store.scores("a", ["p", "q"]) is None
        assert store.cost("a", 512) == {"rounds": 3.0} and store.cost("a", 1024) is None
        store.add_scores("q", {"a": 0.0})
    with opened(tmp_path) as store:
        assert store.scores("a", ["p", "q"]) == [1.0, 0.0]
    with pytest.raises(UsageError, match='made with model = "shipped", and this run has "other"; give another name'):
        Measured(path, "other")


def test_a_prompt_is_named_by_what_its_score_depends_on():
    one = Example("passkey", "text", ("7",), 4, index=1)
    assert name_of(one, 64) == name_of(Example("passkey", "text", ("7",), 4, index=2), 64)
    assert name_of(one, 64) != name_of(Example("passkey", "text", ("8",), 4, index=1), 64)


# The search, on scores that are made up: whether a policy is right on a prompt follows from its settings.


def right(policy: str) -> float:
    """The share of prompts that a policy gets right."""
    if policy == FULL:
        return 0.98
    found = parse(policy)
    quality = 0.98 - 0.5 * (1 - found.static) ** 4 - 0.4 * (1 - found.second) ** 8
    return quality - 0.004 * found.fine - 0.05 * (found.summary == "minmax")


class Scores:
    """In place of ``Evaluator``. pause: seconds a row."""

    pause = 0.0

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def rows(self, examples, policies):
        for example in examples:
            for policy in policies:
                time.sleep(self.pause)
                hard = random.Random(f"{example.prompt}").random() + random.Random(example.prompt + policy).gauss(
                    0, 0.02
                )
                yield {"score": float(hard < right(policy))}


class Counts:
    """In place of a counted step."""

    def __init__(self, shape):
        found = parse(shape.policy)
        self.size = 1.0 if found.name == FULL else found.static * found.second + 0.3 * found.static / found.fine

    def total(self, what):
        return 100 * self.size

    def seconds(self, network):
        return 1 + self.size


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(tune_measure, "Evaluator", Scores)
    monkeypatch.setattr(tune_measure, "count", Counts)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # milliseconds each; what a killed process wrote stays anyway


def prompts(rungs=(8, 16, 8, 16), fresh=20):
    made = (Prompt(f"t/{i}", Example("t", f"prompt {i}", ("a",), 1, index=i)) for i in range(1_000))

    def some(number):
        return tuple(islice(made, number))

    return Prompts(tuple(some(number) for number in rungs), some(fresh))


def search(folder, store, goal, seed=0, exhaustive=False, setup=None, name="made up", axes=AXES, batch=6):
    bench = Bench(store, "shipped", 512, workers=1)
    found = space("mpcache", axes)
    return Search(folder, name, setup or {"seed": seed}, found, goal, bench, prompts(), 0.95, batch, seed, exhaustive)


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


def test_two_runs_do_not_share_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(UsageError, match="another search is at work in .*; wait for it"):
        with locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


# The search, on the scores of a grid that was measured on the shipped model.


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


# Kills.


def _run(folder, exhaustive, pause=0.0):
    """Ends with every policy's outcome, the unfinished trials there are, and all pairs of the store."""
    Scores.pause = pause
    with opened(folder) as store:
        found = search(folder, store, Ceiling("bytes", 0.12), exhaustive=exhaustive, axes=AXES[:3], batch=8)
        found.run(48 if exhaustive else 18)
        rows = [json.loads(line) for line in (folder / "measured.jsonl").read_text().splitlines()]
    pairs = [(row["prompt"], policy) for row in rows if row["kind"] == "scores" for policy in row["scores"]]
    return found, sorted(found.outcomes(), key=lambda outcome: outcome.policy), pairs


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _made_up_run(*arguments):
    """In a process of its own: with what ``made_up`` puts in place of what is slow."""
    tune_measure.Evaluator, tune_measure.count, os.fsync = Scores, Counts, lambda file: None
    _run(*arguments)


def _kill_again_and_again(folder, exhaustive) -> int:
    """How often a run was killed until it was done, at moments drawn, at most 6 times.

    To be called where no bar of tqdm has been made: forked processes share its lock, and would wait for one that was
    killed as it held it.
    """
    path, draws = folder / "measured.jsonl", random.Random(1)
    for kills in range(6):
        process = multiprocessing.get_context("fork").Process(target=_made_up_run, args=(folder, exhaustive, 0.0003))
        process.start()
        enough = _size(path) + draws.randrange(500, 6_000)
        while process.is_alive() and _size(path) < enough:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return kills  # it was done
    return 6


@pytest.mark.parametrize("exhaustive", [False, True], ids=["search", "grid"])
def test_a_run_that_is_killed_again_and_again_loses_nothing(made_up, tmp_path, exhaustive):
    folders = tmp_path / "whole", tmp_path / "killed"
    with processes(1, len, ()) as found:
        (kills,) = found.map(partial(_kill_again_and_again, exhaustive=exhaustive), [folders[1]])
    assert kills >= 3
    found, outcomes, pairs = _run(folders[1], exhaustive)
    assert len(pairs) == len(set(pairs))  # nothing is measured twice
    assert {policy for _, policy in pairs} - {FULL} == {outcome.policy for outcome in outcomes if outcome.prompts}
    assert len(outcomes) == len({outcome.policy for outcome in outcomes})
    names = [prompt.name for prompt in found.prompts.searched]
    for outcome in outcomes:
        scores = found.bench.store.scores(outcome.policy, names[: outcome.prompts])
        assert outcome.accuracy == (mean(scores) if scores else None)
    if exhaustive:
        assert (outcomes, set(pairs)) == (lambda run: (run[1], set(run[2])))(_run(folders[0], True))
    else:
        assert sum(outcome.prompts > 0 for outcome in outcomes) == 18


# The command.

QUICK = ("--policy", "snapkv", "--set", "window=8", "--search", "budget=0.05,0.3,1", "--max-bytes", "0.6")
QUICK += ("--tasks", "passkey", "--lengths", "64", "--samples", "4", "--fresh", "2", "--workers", "1")


def _main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    tune.main()
    return capsys.readouterr().out


def test_the_command_measures_what_quality_and_cost_measure(monkeypatch, capsys, tmp_path):
    page = _main(monkeypatch, capsys, *QUICK, "--out", str(tmp_path))
    name = tmp_path / "snapkv_bytes_at_most_0.6"
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


def test_the_grid_by_itself_and_beside_the_search(made_up, monkeypatch, capsys, tmp_path):
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


@pytest.mark.slow
def test_the_command_goes_on_after_kills(tmp_path):
    """As a file, from another folder, killed for real at three moments drawn; then it ends as one that was not."""
    command = [sys.executable, str(Path(tune.__file__).resolve()), *QUICK, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=tmp_path, check=True)
    path, draws = tmp_path / "killed" / "measured.jsonl", random.Random(2)
    for lines in (1, 4, 7):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], cwd=tmp_path)
        while process.poll() is None and (not path.exists() or path.read_text().count("\n") < lines):
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 0.3))
        process.kill()
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed")], cwd=tmp_path, check=True)
    whole, killed = (json.loads(next((tmp_path / name).glob("*.json")).read_text()) for name in ("whole", "killed"))
    for found in (whole, killed):
        found["policies"].sort(key=lambda row: row["policy"])
        del found["provenance"]
    assert killed == whole
