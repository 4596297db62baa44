"""What a role's cards would hold: together all that the role holds, and no more cards than it takes."""

import sys

import pytest

from crypten_llm.commands.cost import predict
from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.plan import Plan
from experiments.measure import cards_needed
from experiments.measure.cards_needed import RESERVED, needed, of_a_card, reduced

CONFIG = LlamaConfig.from_sizes(hidden=64, heads=8, kv_heads=2, ffn=96, layers=3, vocab=97, context=64)
HELD = predict(CONFIG, Plan(40, 2)).memory["client"]


def test_a_role_is_split_evenly_but_for_caches_of_fewer_heads_than_cards():
    assert of_a_card(CONFIG, HELD, 1) == sum(HELD.values())
    assert of_a_card(CONFIG, HELD, 2) == sum(HELD.values()) / 2
    assert of_a_card(CONFIG, HELD, 8) == HELD["weights"] / 8 + HELD["cache"] / 2
    with pytest.raises(UsageError, match="8 heads do not split over 3 cards"):
        of_a_card(CONFIG, HELD, 3)


def test_the_fewest_cards_are_found():
    for cards in (1, 2, 4, 8):
        room = of_a_card(CONFIG, HELD, cards) + RESERVED
        assert needed(CONFIG, HELD, room) == cards and needed(CONFIG, HELD, room - 1) == {8: None}.get(cards, 2 * cards)


def test_what_is_added_up_is_two_hidden_states_a_layer():
    assert reduced(CONFIG, 5) == 3 * 2 * 5 * 64 * 8


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(cards_needed, "SIZES", {"a": {"hidden": 64, "heads": 8, "kv_heads": 8, "ffn": 96, "layers": 2}})
    monkeypatch.setitem(cards_needed.SIZES["a"], "vocab", 97)
    monkeypatch.setattr(sys, "argv", ["cards_needed", "--tokens", "30", "--models", "a"])
    monkeypatch.setattr(cards_needed, "CARDS", (1, 2))
    cards_needed.main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and all(role in said[i] for i, role in enumerate(("owner", "client", "dealer"), 1))
