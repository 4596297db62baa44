"""The measurement of several sequences beside one, and of a chat's turn beside a prompt."""

import json

import pytest
from hf_models import with_template

from experiments.measure import many_at_once

SIZES = {"hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "layers": 1, "kv_len": 20, "steps": 1, "vocab": 64}


def test_pairs_are_kept_and_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(many_at_once, "TOKEN", many_at_once.Shape(**SIZES))
    model = with_template(tmp_path / "m")
    path = tmp_path / "found.json"
    command = ["--model", str(model), "--prompt-tokens", "30", "--json", str(path), "--timeout", "60", "--repeats"]
    monkeypatch.setattr("sys.argv", ["many_at_once", *command, "1"])
    assert many_at_once.main() == 0
    found = json.loads(path.read_text())
    (pair,), (turn,) = found["sequences"], found["turns"]
    assert pair["ratio"] == pytest.approx(8 * pair["one"] / pair["many"]) and pair["sequences"] == 8
    assert abs(turn["cached"] + turn["new"] - turn["all"]) < 10, "an answer may be written anew in other tokens"
    assert 0 < turn["new"] < turn["cached"]
    assert turn["ratio"] == pytest.approx(turn["turn"] / turn["fresh"]) and found["made_by"]
    monkeypatch.setattr(many_at_once, "of_sequences", lambda *_: {"ratio": 3 * pair["ratio"]})
    monkeypatch.setattr("sys.argv", ["many_at_once", *command, "2", "--only", "sequences"])
    assert many_at_once.main() == 0
    assert [each["ratio"] for each in json.loads(path.read_text())["sequences"]] == [pair["ratio"], 3 * pair["ratio"]]
    assert "sequences" in capsys.readouterr().out
