"""Outliers in the shipped model: factors are found, each kind reaches what it is for, and a run of the command."""

import json
import sys

import pytest
import torch

from crypten_llm.models.checkpoint import load_weights, resolve_model
from crypten_llm.models.config import LlamaConfig
from experiments.measure import outliers
from experiments.measure.outliers import FIRST, GATES, LAYER, STATES, gates_see, reached, until, with_gates, with_states

PROMPTS = [list(range(5, 45)), list(range(60, 100))]


@pytest.fixture(scope="module")
def shipped():
    folder = resolve_model("shipped")
    config = LlamaConfig.from_folder(folder)
    return config, dict(load_weights(folder, config))


@pytest.mark.parametrize("wanted", [0.003, 0.4, 1.0, 7.0, 3e4])
def test_the_factor_that_makes_something_as_large_as_it_should_be(wanted):
    found = until(lambda factor: {"x": torch.tensor(factor)}, lambda made: made["x"].item() / wanted)
    assert 0.97 * wanted < found["x"].item() <= wanted


def test_no_factor():
    with pytest.raises(RuntimeError, match="no factor makes"):
        until(lambda factor: {"x": torch.tensor(factor)}, lambda made: 0.0)


def test_gates_reach_both_ends_and_no_further_than_is_proved(shipped):
    config, weights = shipped
    made = with_gates(weights, gates_see(config, weights, PROMPTS[:1], LAYER))
    assert reached(config, made, PROMPTS[:1])["gates"] == f"-{GATES:.0f} to {GATES:.0f}"
    norm = weights[f"{LAYER}.post_attention_layernorm.weight"]
    row = made[f"{LAYER}.mlp.gate_proj.weight"][0] * norm
    assert row.norm() * config.hidden_size**0.5 == pytest.approx(GATES, rel=1e-3)


def test_hidden_states_are_large_where_the_first_token_is(shipped):
    config, weights = shipped
    made = with_states(weights, gates_see(config, weights, PROMPTS, FIRST))
    first, last = reached(config, made, PROMPTS)["hidden states"].split(" to ")
    assert float(first) > -100 and 0.9 * STATES < float(last) <= STATES


def test_a_run_of_the_command_and_going_on_with_it(shipped, tmp_path, monkeypatch, capsys):
    config, weights = shipped
    monkeypatch.setattr(outliers, "kinds", lambda *_: {"gates": weights})
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["outliers", "--prompts", "1", "--length", "16", "--json", str(path)])
    assert outliers.main() == 0
    rows = json.loads(path.read_text())["kinds"]
    (row,) = rows.values()
    assert row["kind"] == "gates" and 1 < row["tokens"] <= 16 and row["logit_error"] < 0.02
    monkeypatch.setattr(outliers.natural_text, "measure", lambda *_: pytest.fail("all is there"))
    assert outliers.main() == 0 and "gates" in capsys.readouterr().out
