"""The arithmetic and the layout of the cost and reveal tables."""

import pytest

from crypten_llm.session.report import Cost, cost_table, revealed_table
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
