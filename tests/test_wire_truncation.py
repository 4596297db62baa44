"""The command that counts wild truncations: the wire engine's have none, CrypTen's as many as expected."""

import json
import sys

import pytest

from experiments.measure import truncation


def test_counts(tmp_path, monkeypatch, capsys):
    path = tmp_path / "runs" / "out.json"
    monkeypatch.setattr(sys, "argv", ["truncation", "--count", "1.2e6", "--magnitude", "4000", "--json", str(path)])
    truncation.main()
    result = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["truncations"] == 1_200_000
    assert result["wild_wire"] == 0 and result["largest_error_wire_units"] < 1
    expected = result["expected_crypten"]
    assert expected > 2000 and abs(result["wild_crypten"] - expected) < 6 * expected**0.5


def test_a_failing_role_ends_the_command(monkeypatch):
    monkeypatch.setattr(truncation, "factors", None)
    monkeypatch.setattr(sys, "argv", ["truncation", "--count", "10"])
    with pytest.raises(TypeError):
        truncation.main()
