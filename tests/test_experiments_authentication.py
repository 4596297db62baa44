"""What MACs would cost is counted from what is sent and dealt now, all of it."""

import json

import pytest

from crypten_llm.commands.cost import predict
from crypten_llm.links.frames import HEADER
from crypten_llm.models.config import LlamaConfig
from crypten_llm.protocols import ladder, norm
from crypten_llm.session.plan import Plan
from experiments.measure import authentication
from experiments.measure.authentication import CHECK, SECURITY, count, main, totals

SIZES = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "layers": 2, "vocab": 300}
CONFIG = LlamaConfig.from_sizes(**SIZES, context=40)
NO_OPENING = ("stop or go", "public prefix")


@pytest.fixture(scope="module")
def counted():
    return count(CONFIG, 20)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_is_counted_is_what_cost_counts(counted, phase):
    """Headers, rounding to whole bytes of each message, and where frames of the dealer's end, apart."""
    cost = predict(CONFIG, Plan(20, 2)).cost
    assert counted["rounds"][phase] == cost.rounds((phase,))
    sent = sum(
        row["bytes_sent"] - HEADER.size * row["rounds"]
        for entry in cost.ranks
        for row in entry["table"]
        if row["phase"] == phase and row["kind"] not in NO_OPENING
    )
    now = totals(counted["operations"][phase])
    assert now["online"] == pytest.approx(sent / 2, rel=0.01)
    assert now["dealt"] == pytest.approx(cost.dealer_bytes((phase,)), rel=0.01)


def test_macs_are_charged(counted):
    """Nothing is dearer by less than its MAC: an opening has 40 bits more, a dealt number twice as many and 80."""
    for operations in (counted["operations"]["prefill"], counted["operations"]["decode"]):
        assert all(entry["online mac"] >= entry["online"] for entry in operations.values())
        assert all(entry["dealt mac"] >= entry["dealt"] for entry in operations.values())
        assert totals(operations)["dealt mac"] > 2 * totals(operations)["dealt"]
        logits = operations["logits"]
        assert logits["dealt mac"] > 2 * logits["dealt"] + 2 * CONFIG.vocab_size * SECURITY / 8 - 1
    assert counted["weights"] > 2 * (64 + SECURITY) / 8 * SIZES["vocab"] * SIZES["hidden"]


def test_nothing_stays_replaced():
    before = ladder.below, norm.normalized, norm._times, norm._inverse_root
    with pytest.raises(RuntimeError), authentication.noting():
        raise RuntimeError
    assert before == (ladder.below, norm.normalized, norm._times, norm._inverse_root)


def test_the_command(capsys, counted):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    assert main([*words, "--prompt-tokens", "20"]) == 0
    shown = capsys.readouterr().out
    rounds = counted["rounds"]["decode"]
    assert f"decode: {rounds} rounds, {rounds + CHECK} with a check of MACs" in shown
    assert main([*words, "--prompt-tokens", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == counted["rounds"]
