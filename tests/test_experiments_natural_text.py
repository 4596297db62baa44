"""Closeness on text: what is cut, how a prompt is compared and summed up, and a run of the command."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from crypten_llm.errors import UsageError
from crypten_llm.session.calibration import PROSE
from experiments.measure import natural_text
from experiments.measure.natural_text import compared, cut, summary


@pytest.mark.parametrize(("count", "length"), [(1, 10), (2, 5), (3, 3), (2, 2), (4, 2)])
def test_stretches_are_spread_and_have_no_token_in_common(count, length):
    found = cut(range(10), count, length)
    assert [len(ids) for ids in found] == [length] * count
    assert len({token for ids in found for token in ids}) == count * length
    assert found[0][0] == 0 and (count == 1 or found[-1][-1] == 9)
    assert all(ids == list(range(ids[0], ids[0] + length)) for ids in found)


def test_what_cannot_be_cut():
    with pytest.raises(UsageError, match="the text has 10 tokens, and 3 prompts of 4 need 12; give --prompts"):
        cut(range(10), 3, 4)
    for count, length in ((0, 4), (2, 1)):
        with pytest.raises(UsageError, match="at least one is needed, of at least two tokens"):
            cut(range(10), count, length)


def test_a_prompt_is_compared_token_by_token():
    plain = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.5, 0.0], [0.0, 0.0, 9.0]])
    wire = plain.clone()
    wire[1] = torch.tensor([1.5, 2.0, 0.0])
    row = compared([2, 1, 0], plain, wire)
    assert (row["tokens"], row["equal"], row["margins_lost"], row["logit_error"]) == (3, 2, [0.5], 0.5)
    assert row["mean_logit_error"] == pytest.approx(1 / 9)
    expected = [-math.log(math.exp(3) / sum(map(math.exp, (0, 3, 1))))]
    expected += [-math.log(math.exp(x) / sum(map(math.exp, (2, 1.5, 0)))) for x in (2, 1.5)]
    assert row["loss_plain"] == pytest.approx(expected[0] + expected[1])
    assert row["loss_wire"] == pytest.approx(expected[0] + expected[2])


def test_prompts_are_weighed_by_their_tokens():
    common = {"mean_logit_error": 0.1, "logit_error": 0.2}
    rows = [
        {"tokens": 3, "equal": 3, "margins_lost": [], "loss_plain": 2.0, "loss_wire": 2.5, **common},
        {"tokens": 5, "equal": 4, "margins_lost": [0.003], "loss_plain": 4.0, "loss_wire": 3.5, **common}
        | {"logit_error": 0.4},
    ]
    found = summary(rows)
    assert (found["tokens"], found["equal"], found["agreement"]) == (8, 7, 7 / 8)
    assert (found["logit_error"], found["margins_lost"]) == (0.4, "0.003")
    assert found["mean_logit_error"] == pytest.approx(0.1)
    assert found["perplexity_plain"] == pytest.approx(math.e) == found["perplexity_wire"]
    assert found["perplexity_off"] == pytest.approx(0)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the command on the shipped model; returns the file that it kept and what it printed."""
    path = tmp_path / "runs" / "text.json"

    def call(*arguments):
        words = ["natural_text", "--model", "shipped", "--length", "6", "--json", str(path), *arguments]
        monkeypatch.setattr(sys, "argv", words)
        assert natural_text.main() == 0
        return json.loads(path.read_text("utf-8")), capsys.readouterr().out

    return call


def test_a_run_compares_wire_with_plain_and_goes_on_where_it_stopped(command, monkeypatch):
    result, shown = command("--prompts", "2")
    (found,) = result["summary"].values()
    assert (found["prompts"], found["tokens"]) == (2, 12) and "agreement" in shown
    assert found["equal"] >= 11 and 0 < found["logit_error"] < 0.05  # of two computations, close ones
    assert abs(found["perplexity_off"]) < 2e-3 and found["perplexity_plain"] > 1
    monkeypatch.setattr(natural_text, "measure", lambda *_: pytest.fail("all is there"))
    assert command("--prompts", "2") == (result, shown)


def test_what_the_text_must_hold(command, monkeypatch, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("A short text.")
    monkeypatch.setattr(sys, "argv", ["natural_text", "--model", "shipped", "--text", str(short)])
    assert natural_text.main() == 2
    assert "and 21 prompts of 96 need 2016" in capsys.readouterr().err


def test_the_text_that_ships_is_long_enough():
    """Of most tokenizers a word is more than a token."""
    assert len(PROSE.read_text("utf-8").split()) > 21 * 96
