"""What tuning measured is kept: over torn lines, beside other runs, and over runs that were killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
from tune_runs import AXES, QUICK, Scores, make_up, opened, search

from crypten_llm.errors import UsageError
from experiments import tune
from experiments.tasks import Example
from experiments.tools.processes import processes
from experiments.tuning.goal import Ceiling
from experiments.tuning.measure import FULL
from experiments.tuning.store import Measured, name_of
from experiments.tuning.study import locked


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


def test_two_runs_do_not_share_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(UsageError, match="another search is at work in .*; wait for it"):
        with locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


# Kills


@pytest.fixture
def made_up(monkeypatch):
    make_up(monkeypatch.setattr)


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
    """In a process of its own."""
    make_up(setattr)
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
