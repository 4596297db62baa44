"""Files of results: what a kill leaves of them, and who made them."""

import json

import pytest

from crypten_llm.errors import UsageError
from experiments.tools.journal import Journal
from experiments.tools.provenance import sign


def test_a_journal_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    journal = Journal(path, {"seed": 0})
    journal.append({"kind": "cost", "value": 1})
    with path.open("ab") as file:
        file.write(b'{"kind":"cost","val')  # what a kill leaves
    again = Journal(path, {"seed": 0})
    assert again.of("cost") == [{"kind": "cost", "value": 1}]
    again.append({"kind": "cost", "value": 2})
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["kind"] for line in lines] == ["run", "cost", "cost"]
    run = lines[0]
    assert run["config"] == {"seed": 0} and run["versions"]["torch"] and "cores" in run["machine"]
    assert set(run) == {"kind", "config", "revision", "versions", "machine"}


def test_each_revision_that_added_to_a_journal_is_named(tmp_path, monkeypatch):
    path, revision = tmp_path / "a.jsonl", "experiments.tools.provenance.revision"
    for name in ("one", "another", "another", "a third"):
        monkeypatch.setattr(revision, lambda name=name: name)
        journal = Journal(path, {"seed": 0})
        if name != "a third":  # that one looks at the file and adds nothing
            journal.append({"kind": "cost"})
    assert [run["revision"] for run in journal.runs] == ["one", "another"]
    lines = [json.loads(line)["kind"] for line in path.read_text("utf-8").splitlines()]
    assert lines == ["run", "cost", "run", "cost", "cost"]


def test_each_run_that_made_a_result_signs_it_once(monkeypatch):
    result = {"rows": {}}
    for name in ("one", "one", "another"):
        monkeypatch.setattr("experiments.tools.provenance.revision", lambda name=name: name)
        sign(result, "numpy")
    assert [maker["revision"] for maker in result["made_by"]] == ["one", "another"]
    assert all(set(maker) == {"revision", "versions", "machine"} for maker in result["made_by"])


def test_a_journal_of_another_configuration_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    Journal(path, {"seed": 0, "samples": 4}).append({"kind": "cost"})
    with pytest.raises(UsageError, match=r"was made with seed = 0, and this run has 1; give another name \(--out\)"):
        Journal(path, {"seed": 1, "samples": 4})
    assert len(path.read_text("utf-8").splitlines()) == 2
    grown = Journal(path, {"seed": 0, "samples": 6}, free=["samples"])
    grown.append({"kind": "cost"})
    assert [run["config"]["samples"] for run in grown.runs] == [4, 6]


@pytest.mark.parametrize("text", ["# notes\n", '{"a": 1}\n', "[1]\n", '{"kind": "cost"}\n'])
def test_a_file_of_another_kind_is_refused_and_left(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError, match="is no file of results of this command"):
        Journal(path, {})
    assert path.read_text("utf-8") == text
