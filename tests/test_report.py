"""The arithmetic and the layout of the cost and reveal tables."""

import pytest

from crypten_llm.session.report import Cost, cost_table, ledger, revealed_table, turns_table
from crypten_llm.session.request import Result
from crypten_llm.units import size


def row(phase, kind, rounds, sent, dealer=0, seconds=0.0):
    return {
        "phase": phase,
        "kind": kind,
        "rounds": rounds,
        "bytes_sent": sent,
        "dealer_rounds": rounds,
        "dealer_bytes_sent": dealer,
        "dealer_bytes_received": 10 * dealer,
        "seconds": seconds,
    }


OWNER = [row("load", "weights", 1, 7), row("prefill", "mlp", 4, 1000, 5, 9.0), row("decode", "mlp", 2, 30, 1, 9.0)]
CLIENT = [row("prefill", "mlp", 3, 2000, 0, 1.5), row("decode", "mlp", 3, 40, 0, 0.5), row("setup", "other", 9, 9)]
COST = Cost([{"table": OWNER, "peak_bytes": 1}, {"table": CLIENT, "peak_bytes": 2}, {"table": [], "peak_bytes": 3}], 2)


def test_totals():
    assert (COST.rounds(), COST.bytes_sent()) == (6, [1030, 2040])
    assert (COST.rounds(("prefill",)), COST.bytes_sent(("prefill",))) == (4, [1000, 2000])
    assert (COST.dealer_bytes(), COST.dealer_bytes(("decode",)), COST.dealer_rounds()) == (66, 11, 6)
    assert (COST.seconds("prefill"), COST.seconds("decode"), COST.peak_bytes()) == (1.5, 0.5, [1, 2, 3])


def test_rows_take_the_most_of_any_party_and_the_clients_seconds():
    rows = {(entry["phase"], entry["kind"]): entry for entry in COST.table()}
    assert list(rows) == [("load", "weights"), ("prefill", "mlp"), ("decode", "mlp")]
    assert rows["prefill", "mlp"] == {
        "phase": "prefill",
        "kind": "mlp",
        "rounds": 4,
        "bytes_sent": 2000,
        "dealer_bytes": 55,
        "seconds": 1.5,
    }


def test_the_printed_table_has_a_total_per_phase():
    lines = cost_table(COST).splitlines()
    assert lines[0].split() == ["phase", "operation", "rounds", "sent", "a", "party", "dealer", "seconds"]
    assert [line.split()[0] for line in lines[1:]] == ["load", "total", "prefill", "total", "decode", "total"]
    assert lines[4].split() == ["total", "4", "2.0", "KB", "55", "B", "1.50"]
    assert len({len(line) for line in lines}) == 1


def test_the_reveal_table_names_who_learns_what():
    entry = {"to": "client", "what": "logits of each generated token", "why": "it samples", "times": 3}
    assert revealed_table([entry]).splitlines()[1].split() == ["client", *entry["what"].split(), "3"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (3.4e6, "3.4 MB"), (52.9e9, "52.9 GB")]
)
def test_sizes_for_people(count, text):
    assert size(count) == text


def entry(what, times, to="all"):
    return {"what": what, "to": to, "why": "", "times": times}


def test_the_ledger_of_several_requests_counts_what_was_shared_once():
    loaded = [entry("architecture", 1)]
    first = [entry("architecture", 1), entry("prompt length: 5", 1), entry("logits", 3, "client")]
    second = [entry("architecture", 1), entry("prompt length: 7", 2), entry("logits", 2, "client")]
    found = ledger(loaded, [first, second])
    assert [(e["what"], e["to"], e["times"]) for e in found] == [
        ("architecture", "all", 1),
        ("prompt length: 5", "all", 1),
        ("logits", "client", 5),
        ("prompt length: 7", "all", 2),
    ]
    assert ledger(loaded, []) == loaded
    assert first[2]["times"] == 3, "what it was made of is left alone"


def test_the_table_of_turns():
    def turn(cached, new, tokens, rounds, seconds):
        rows = [row("prefill", "mlp", rounds, 1000, 50, seconds), row("decode", "mlp", 1, 500, 7, 0.5)]
        cost = Cost([{"table": rows, "peak_bytes": 0, "rank": rank} for rank in range(2)], 2)
        facts = dict.fromkeys(("text", "engine", "policy", "finish_reason"), "")
        return Result(
            token_ids=[1] * tokens, prompt_tokens=new, seconds={}, cost=cost, revealed=[], cached_tokens=cached, **facts
        )

    lines = turns_table([turn(0, 39, 8, 10, 1.0), turn(46, 18, 14, 20, 0.25)]).splitlines()
    assert lines[0].split() == ["turn", "cached", "new", "answer", "rounds", "sent", "a", "party", "dealer", "seconds"]
    assert lines[1].split()[:5] == ["1", "0", "39", "8", "11"] and lines[1].split()[-1] == "1.50"
    assert lines[2].split()[:5] == ["2", "46", "18", "14", "21"] and lines[2].split()[-1] == "0.75"
    assert "1.5 KB" in lines[1]
