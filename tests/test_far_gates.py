"""Learning which kv heads look far."""

import pytest
import torch
from eviction_runs import VOCAB, model, peaked_weights
from safetensors.torch import load

from crypten_llm.commands.cli import main
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.models.llama import Llama
from crypten_llm.session import far_gates, far_heads

SIZE, RECENT, START = 60, 8, 2


@pytest.fixture(scope="module")
def made():
    config = model(4, 2, 2).config
    return config, peaked_weights(config, 1.8, 224)


def prompt(seed=3):
    ids = torch.randint(0, VOCAB, (SIZE,), generator=torch.Generator().manual_seed(seed)).tolist()
    return far_heads.Needle(ids, 10, 14, 5)


def hidden(made, gates, layer=0):
    config, weights = made
    engine = far_gates._Gated("cpu", gates, START, RECENT)
    with torch.no_grad():
        return far_gates._hidden(Llama(engine, config, dict(weights)), engine, torch.tensor(prompt().ids), layer)


def test_open_gates_are_the_model_and_closed_ones_its_windows(made):
    import eviction
    from crypten_llm.session.plan import parse_policy

    config, weights = made
    model = Llama(PlainEngine(), config, dict(weights))
    one_hot = PlainEngine().tokens(torch.tensor(prompt().ids), SIZE, config.vocab_size)
    eviction.register("far-none", far_heads.file(torch.zeros(2, 2)))
    with torch.no_grad():
        everything = model.norm(model.extend(one_hot, model.new_cache()))
        torch.testing.assert_close(hidden(made, torch.ones(2, 2)), everything)
        torch.testing.assert_close(hidden(made, torch.full((2, 2), 0.3), None), everything)
        for far in (1, 2, 3):  # of the four kv heads, the first ones by the file
            cache = model.new_cache()
            policy = f"head_split(far={far / 4},start={START},recent={RECENT},weights=far-none)"
            cache.follow(parse_policy(policy), SIZE)
            gates = (torch.arange(4) < far).float().reshape(2, 2)
            expected = model.norm(model.extend(one_hot, cache))
            torch.testing.assert_close(hidden(made, gates), expected, atol=1e-4, rtol=1e-4)
            assert (expected - everything).abs().max() > 0.01


def test_the_head_that_matters_least_closes_first(made, monkeypatch):
    """Which one that is, closing each alone tells."""
    config, weights = made
    monkeypatch.setattr(far_gates, "PLAIN_TEXT", 1)  # all tokens count
    monkeypatch.setattr(far_gates, "PENALTY", 1.0)  # in a model of random weights every head matters
    everything, off = hidden(made, torch.ones(2, 2)), torch.empty(2, 2)
    for place in range(4):
        gates = torch.ones(4)
        gates[place] = 0
        off.view(-1)[place] = (hidden(made, gates.reshape(2, 2)) - everything).square().mean()
    steps = []
    gates = far_gates.learn(config, weights, [prompt()], 60, start=START, recent=RECENT, beat=steps.append)
    assert steps == list(range(1, 61)) and 0 <= gates.min() < 0.6
    assert off.argmin() == gates.argmin() and gates.max() > 0.9


def test_heads_of_equal_gates_are_in_the_order_of_their_attention():
    gates, attention = torch.tensor([[1.0, 0.0], [0.0, 0.4]]), torch.tensor([[0.1, 0.2], [0.3, 0.0]])
    assert far_heads.ranks(far_gates.scores(gates, attention)).tolist() == [[0, 3], [2, 1]]


def test_the_command_learns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(far_heads, "LONGEST", 200)
    monkeypatch.setattr(far_gates, "LENGTHS", (150,))
    path = tmp_path / "heads.safetensors"
    assert main(["calibrate", "--heads-out", str(path), "--learn", "2"]) == 0
    assert sorted(load(path.read_bytes())["ranks"].flatten().tolist()) == list(range(24))
    assert main(["calibrate", "--learn", "2"]) == 2
    assert "--learn is 2; give a number of steps, and --heads-out for what they find" in capsys.readouterr().err
