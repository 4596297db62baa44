"""The comparison of policies: configuration, cells that survive a kill, tables and pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest

from crypten_llm.errors import UsageError
from crypten_llm.session.api import PrivateLlama
from experiments import compare_baselines
from experiments.baselines import cells, plots
from experiments.baselines import config as configuration
from experiments.baselines.config import Ablation, Config, CrypTen, Private
from experiments.baselines.plots import PICTURES
from experiments.baselines.policies import at_budget
from experiments.baselines.report import markdown
from experiments.baselines.summary import Summary
from experiments.measure.eviction_counts import ATTENTION, count, shape_of
from experiments.tools.journal import Journal

ROOT = Path(__file__).parents[1]
TINY = Config(
    policies=("full", "streaming_llm", "mpcache", "h2o(heavy=9,recent=9)"),
    tasks=("few_shot", "key_value", "stories"),
    lengths=(96,),
    budgets=(0.2, 0.5),
    samples=3,
    text_samples=2,
    ablation=Ablation(rows=("static only",), budgets=(0.2,), lengths=(96,)),
    crypten=CrypTen(policies=()),
    private=Private(policies=("full", "mpcache"), tasks=("few_shot",), length=96, samples=1, tokens=4),
)


@pytest.fixture(autouse=True)
def looks(monkeypatch):
    """What pictures here give to policies of no table is not left to other tests."""
    monkeypatch.setattr(plots, "STYLES", dict(plots.STYLES))


# Configuration.


def test_a_printed_configuration_is_read_back(tmp_path, capsys):
    for arguments, config in (([], Config()), (["--quick"], configuration.QUICK)):
        assert compare_baselines.main([*arguments, "--print-config"]) == 0
        path = tmp_path / "mine.toml"
        path.write_text(capsys.readouterr().out, "utf-8")
        assert configuration.load(path) == config
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"samples": 3, "private": {"tokens": 2}}), "utf-8")
    assert configuration.load(path) == Config(samples=3, private=Private(tokens=2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"polices": []}, "unknown setting 'polices': did you mean 'policies'"),
        ({"private": {"token": 1}}, "unknown setting private.'token': did you mean 'tokens'"),
        ({"policies": ["full", "h20"]}, "unknown policy 'h20': did you mean 'h2o'"),
        ({"policies": ["full", "h2o(heavi=3)"]}, "policy h2o has no setting 'heavi'"),
        ({"policies": ["h2o"]}, "policies lack 'full'"),
        ({"tasks": ["paskey"]}, "unknown task 'paskey'; the nearest: passkey"),
        ({"tasks": []}, "tasks is empty"),
        ({"budgets": [0.2, 1.5]}, "budget 1.5 is no share of the prompt"),
        ({"budgets": 0.2}, "setting budgets is 0.2; give a list such as"),
        ({"samples": "many"}, "setting samples is 'many'; give a value such as 50"),
        ({"samples": True}, "setting samples is True"),
        ({"samples": 1}, "samples is 1; it must be 2 or more"),
        ({"crypten": {"steps": 0}}, "steps is 0; it must be 1 or more"),
        ({"private": 3}, "setting private is 3; give a table of settings"),
        ({"ablation": {"rows": ["no sharin"]}}, "unknown row of the ablation 'no sharin': did you mean 'no sharing'"),
        ({"ablation": {"lengths": [100]}}, "the ablation has length 100, which is not in lengths"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UsageError) as error:
        configuration.from_dict(given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "samples 3", "is not TOML"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[]", "holds no settings"),
        ("b.toml", None, "cannot read"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path, capsys, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text, "utf-8")
    assert compare_baselines.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "--print-config" in error and error.count("\n") == 1


# Cells.


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The tiny grid, accuracy and cost, in one piece."""
    journal = Journal(tmp_path_factory.mktemp("baselines") / "whole.jsonl", TINY.to_dict())
    with one_process():
        cells.measure_accuracy(TINY, journal, 8, workers=1)
        cells.count_costs(TINY, journal, shape(), workers=1)
    return journal


def shape():
    return shape_of("shipped", 96)


@contextmanager
def one_process():
    """Small cells, and counts in this process: to start a pool takes longer than what is tested."""

    class Here:
        map = staticmethod(map)

    @contextmanager
    def processes(count, start, *arguments):
        yield Here

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "processes", processes)
        patch.setattr(cells, "BLOCK", 2)
        yield


def test_cells_are_blocks_of_prompts_and_hold_every_policy(measured):
    blocks = [(row["task"], row["first"]) for row in measured.of("accuracy")]
    assert blocks == [("few_shot", 0), ("few_shot", 2), ("key_value", 0), ("key_value", 2), ("stories", 0)]
    policies = cells.texts(TINY, 96, 8)
    assert len(policies) == 1 + 2 + 2 + 1 + 1
    for row in measured.of("accuracy"):
        assert list(row["policies"]) == policies
        sizes = {len(cell["scores"]) for cell in row["policies"].values()}
        assert sizes == {1 if row["first"] else 2}
    first = measured.of("accuracy")[0]["policies"]["full"]
    assert first["scores"] == [1, 1] and first["kept"] == first["attended"] == 1.0


def test_a_grid_that_grows_adds_what_is_missing(measured, tmp_path):
    path = tmp_path / "grown.jsonl"
    path.write_bytes(measured.path.read_bytes())
    grown = replace(TINY, tasks=("few_shot",), samples=4, policies=(*TINY.policies, "random(budget=9)"))
    journal = Journal(path, grown.to_dict(), configuration.CHOOSES_CELLS)
    with one_process():
        cells.measure_accuracy(grown, journal, 8, 1)
        cells.measure_accuracy(grown, journal, 8, 1)
    whole, grew = journal.of("accuracy")[len(measured.of("accuracy")) :]
    assert (whole["first"], list(whole["policies"])) == (0, ["random(budget=9)"])
    assert grew["first"] == 2 and list(grew["policies"]) == cells.texts(grown, 96, 8)
    summary = Summary(grown, journal, 8)
    assert {len(of["few_shot"]) for of in summary._scores.values() if "few_shot" in of} == {4}
    assert all(result.difference for result in summary.policies)


def test_costs_are_those_of_the_counted_step(measured):
    policy = at_budget("mpcache", 0.2, 96, 8)
    row = next(row for row in measured.of("cost") if row["policy"] == policy)
    step = count(replace(shape(), kv_len=96, policy=policy))
    everything = {kind for kind, _ in step.counts}
    assert row["rounds"] == float(step.total("rounds", everything)) > row["attention_rounds"]
    assert row["attention_online_bytes"] == float(step.total("online", ATTENTION))
    assert row["dealer_bytes"] == float(step.total("dealer", everything))
    assert cells.seconds(row, "wan") == step.seconds("wan") > cells.seconds(row, "lan")


def test_a_run_that_was_stopped_goes_on_and_comes_to_the_same(measured, tmp_path, monkeypatch):
    path = tmp_path / "stopped.jsonl"
    append = Journal.append

    def stop_at(count):
        def stopping(self, row):
            append(self, row)
            if len(self.rows) == count:
                raise KeyboardInterrupt

        return stopping

    counted = {row["policy"]: row for row in measured.of("cost")}
    monkeypatch.setattr(cells, "_counted", lambda shape: counted[shape.policy])
    with one_process():
        for place in (2, 6):
            monkeypatch.setattr(Journal, "append", stop_at(place))
            journal = Journal(path, TINY.to_dict())
            with pytest.raises(KeyboardInterrupt):
                cells.measure_accuracy(TINY, journal, 8, workers=1)
                cells.count_costs(TINY, journal, shape(), workers=1)
        monkeypatch.setattr(Journal, "append", append)
        journal = Journal(path, TINY.to_dict())
        assert len(journal.rows) == 6
        cells.measure_accuracy(TINY, journal, 8, workers=1)
        cells.count_costs(TINY, journal, shape(), workers=1)
    assert journal.rows == measured.rows


def test_private_answers_are_compared_token_by_token(tmp_path, monkeypatch):
    """Both sides on ``plain`` here, the second one spoiled; the slow test below runs ``wire``."""
    opened, made = PrivateLlama.from_pretrained, []

    def plain(model, engine, **settings):
        made.append(engine)
        return opened(model, engine="plain")

    greedy = cells.agreement.greedy

    def spoiled(llama, ids, tokens, policy):
        token_ids, logits = greedy(llama, ids, tokens, policy=policy)
        if len(made) == 2 and policy != "full":
            token_ids[-1] += 1
            logits = logits + 0.5
        return token_ids, logits

    monkeypatch.setattr(PrivateLlama, "from_pretrained", plain)
    monkeypatch.setattr(cells.agreement, "greedy", spoiled)
    journal = Journal(tmp_path / "a.jsonl", TINY.to_dict())
    cells.answer_privately(TINY, journal, 8, timeout=60)
    assert made == ["plain", "wire"]
    rows = journal.of("private")
    assert [(row["index"], row["policy"] == "full") for row in rows] == [(0, True), (0, False)]
    for row in rows:
        spoilt = row["policy"] != "full"
        assert row["equal"] is not spoilt and row["tokens"] - row["agree"] == spoilt
        assert row["logit_error"] == pytest.approx(0.5 * spoilt)
    cells.answer_privately(TINY, journal, 8, timeout=60)
    assert len(made) == 2  # nothing was left to do


# Tables and pictures.


@pytest.fixture(scope="module")
def summary(measured):
    """With rows as the parties of two engines leave them."""
    journal = copy(measured)
    journal.rows = list(measured.rows)
    for policy in ("full", at_budget("mpcache", 0.2, 96, 8)):
        where = {"kind": "private", "task": "few_shot", "index": 0, "length": 96, "policy": policy}
        compared = {"tokens": 3, "agree": 2, "equal": False, "logit_error": 0.01, "margins_lost": [0.002]}
        cost = next(row for row in journal.of("cost") if row["policy"] == policy)
        crypten = cost | {"engine": "crypten", "online_bytes": 2 * cost["online_bytes"], "seconds": 3.0}
        journal.rows += [where | compared, crypten]
    return Summary(TINY, journal, 8)


def test_results_join_the_blocks_and_stand_against_full(summary):
    by = {(result.entry.name, result.entry.budget): result for result in summary.policies}
    assert list(by) == [
        ("full", None),
        *[(name, budget) for name in ("streaming_llm", "mpcache") for budget in (0.2, 0.5)],
        ("h2o(heavy=9,recent=9)", None),
    ]
    full, some = by["full", None], by["streaming_llm", 0.2]
    assert (full.difference.mean, full.difference.low, full.difference.high) == (0, 0, 0)
    assert set(some.tasks) == {"few_shot", "key_value"} and set(some.losses) == {"stories"}
    assert some.mean.mean == pytest.approx((some.tasks["few_shot"].mean + some.tasks["key_value"].mean) / 2)
    assert some.difference.mean == pytest.approx(some.mean.mean - full.mean.mean)
    assert some.difference.high < 0
    for result in summary.over_lengths:
        name, budget = result.entry.name, result.entry.budget or 0.2
        assert summary.beside(name, "full", budget) == result.difference
        other = summary.beside(name, "streaming_llm", budget)
        rival = next(r for r in summary.over_lengths if (r.entry.name, r.entry.budget) == ("streaming_llm", budget))
        assert other.mean == pytest.approx(result.mean.mean - rival.mean.mean)
        assert other.low <= other.mean <= other.high
    assert some.losses["stories"].mean > full.losses["stories"].mean
    assert some.attended == pytest.approx(0.2, abs=0.03)
    assert [result.entry.name for result in summary.ablation] == ["static only"]
    assert [result.mean for result in summary.over_lengths] == [result.mean for result in summary.policies]


def test_tables_hold_the_figures(summary, measured):
    text = markdown(summary, measured.runs, "the command", ["a.png"])
    assert "Made by `the command`; model `shipped`, seed 0. Revision" in text
    assert "![a.png](a.png)" in text
    for heading in ("## 96 tokens", "## Ablation", "## The same settings on engine `crypten`", "## Answered privately"):
        assert heading in text
    lines = text[text.index("## 96 tokens") :].splitlines()
    mine = next(line for line in lines if line.startswith("| `streaming_llm` | 20 %"))
    result = next(r for r in summary.policies if r.entry.name == "streaming_llm" and r.entry.budget == 0.2)
    assert f"| {100 * result.mean.mean:.1f} [{100 * result.mean.low:.1f}, {100 * result.mean.high:.1f}] |" in mine
    assert f"| {cells.seconds(result.cost['wire'], 'wan'):.2f} |" in mine
    assert f"`{result.entry.text}`" in text[text.index("## Settings") :]
    assert "| `mpcache` | 96 | 1 | 0 of 1 | 2 of 3 | 0.0100 | 0.002 |" in text
    columns = {line.count("|") for line in lines[2:8]}
    assert len(columns) == 1


def test_a_table_of_what_is_not_measured_yet_has_dashes(tmp_path):
    journal = Journal(tmp_path / "a.jsonl", TINY.to_dict())
    text = markdown(Summary(TINY, journal, 8), journal.runs, "x")
    assert "| `full` | – | – | – | – | – | – | – | – | – | – |" in text
    assert compare_baselines.report(Summary(TINY, journal, 8), journal, tmp_path / "a", "x") == [tmp_path / "a.md"]


def test_pictures_show_every_policy(summary, measured, tmp_path):
    from matplotlib.image import imread

    written = compare_baselines.report(summary, measured, tmp_path / "out", "x")
    assert [path.name for path in written] == ["out.md", *(f"out-{name}.png" for name in PICTURES)]
    for path in written[1:]:
        assert imread(path).std() > 0.05
    labels = {text.get_text() for text in PICTURES["accuracy"](summary).legends[0].get_texts()}
    assert labels == {"full", "streaming llm", "mpcache", "h2o(heavy=9,recent=9)"}


def test_only_report_writes_what_there_is(measured, tmp_path, capsys):
    config, out = tmp_path / "tiny.json", tmp_path / "out"
    config.write_text(json.dumps(TINY.to_dict()), "utf-8")
    (tmp_path / "out.jsonl").write_bytes(measured.path.read_bytes())
    before = (tmp_path / "out.jsonl").read_text("utf-8")
    assert compare_baselines.main(["--config", str(config), "--out", str(out), "--only", "report"]) == 0
    assert "against_full" in capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_text("utf-8").startswith(before)
    assert compare_baselines.main(["--config", str(config), "--out", str(out), "--only", "report", "--seed", "1"]) == 2
    assert "was made with seed = 0, and this run has 1" in capsys.readouterr().err


SMALL = replace(
    TINY,
    policies=("full", "mpcache"),
    tasks=("few_shot",),
    budgets=(0.2,),
    samples=2,
    ablation=Ablation(rows=(), budgets=(), lengths=()),
    crypten=CrypTen(policies=("full",), lengths=(96,), steps=1),
)


def test_a_small_grid_runs_as_a_script_and_survives_a_kill(tmp_path):
    """From another folder; killed without warning once it has cells, and started again."""
    (tmp_path / "small.json").write_text(json.dumps(SMALL.to_dict()), "utf-8")
    command = [sys.executable, ROOT / "experiments" / "compare_baselines.py", "--config", "small.json", "--out", "out"]
    command += ["--workers", "1", "--only", "accuracy", "cost", "report"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True) as process:
        path = tmp_path / "out.jsonl"
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 2):
            time.sleep(0.02)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    kept = path.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert path.read_bytes().startswith(kept)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [row["kind"] for row in rows].count("accuracy") == 1 and [row["kind"] for row in rows].count("cost") == 2
    assert sorted(path.name for path in tmp_path.glob("out*")) == [
        *(f"out-{name}.png" for name in sorted(PICTURES)),
        *("out.jsonl", "out.md"),
    ]
    assert "against_full" in done.stdout


def test_parties_measure_and_answer(tmp_path, capsys):
    """The stages that start real ones, on both engines; done again, they start none."""
    (tmp_path / "small.json").write_text(json.dumps(SMALL.to_dict()), "utf-8")
    command = ["--config", str(tmp_path / "small.json"), "--out", str(tmp_path / "out"), "--only", "crypten", "private"]
    assert compare_baselines.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    private = [row for row in rows if row["kind"] == "private"]
    assert len(private) == 2 and all(row["equal"] for row in private)
    assert [row["engine"] for row in rows if row["kind"] == "cost"] == ["crypten"]
    capsys.readouterr()
    assert compare_baselines.main(command) == 0
    assert "crypten: 0 new cells" in (again := capsys.readouterr().out) and "private: 0 new cells" in again
