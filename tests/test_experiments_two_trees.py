"""Two checkouts side by side: their steps alternate, ratios are of pairs, and what cannot be run is one line."""

import pytest

from crypten_llm.roles import role_names
from experiments.measure import two_trees
from experiments.measure.two_trees import HERE, measure


class Steps:
    """Stands for a ``Tree``: notes when its turn was."""

    def __init__(self, name, order, walls):
        self.name, self.order, self.walls = name, order, iter(walls)

    def step(self):
        self.order.append(self.name)
        return {"wall": next(self.walls)}


def test_steps_alternate_and_ratios_are_of_pairs():
    order = []
    here, there = Steps("here", order, (9.0, 8.0, 30.0)), Steps("there", order, (10.0, 10.0, 10.0))
    pairs = [two_trees._pair(here, there, turn) for turn in range(3)]
    assert order == ["here", "there", "there", "here", "here", "there"]
    row = two_trees._row("wall", pairs)
    assert (row["here, ms"], row["there, ms"], row["here against there"]) == (9.0, 10.0, "-10.0 %")
    assert row["quartiles"] == "-20.0 to +200.0 %"


@pytest.mark.parametrize(
    "arguments, words", [(["/nowhere"], "is no checkout"), ([str(HERE), "--steps", "0"], "--steps")]
)
def test_what_cannot_be_run_is_one_line(arguments, words, capsys):
    assert two_trees.main(arguments) != 0
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("with_tape", (False, True))
def test_a_checkout_beside_itself(with_tape):
    sizes = dict(hidden=64, heads=2, kv_heads=2, ffn=96, layers=1, kv_len=16, vocab=128)
    rows = measure(HERE, sizes, 2, with_tape)
    parties = [f"cpu of {name}" for name in role_names(2)[: 2 if with_tape else 3]]
    assert [row["figure"] for row in rows] == ["wall", "cpu", *parties]
    assert all(row["here, ms"] > 0 and row["there, ms"] > 0 for row in rows)
