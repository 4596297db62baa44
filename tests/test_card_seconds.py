"""Seconds of a GPU: a card's constants come back out of what they made, and ``cost --device`` predicts by them."""

import functools
import json
import sys

import pytest
import torch

from crypten_llm.commands import machine
from crypten_llm.commands.cli import main
from crypten_llm.commands.cost import predict
from crypten_llm.commands.machine import CAPTURED, DEALER, PEER_MEMORY, PREFILL, SOCKETS, Card, Machine
from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan
from experiments.measure import card_seconds
from experiments.measure.predicted_seconds import CONSTANTS
from experiments.tools import provenance

MADE_OF = {
    SOCKETS: {
        PREFILL: Machine(3e-3, card_seconds.MANY_ROWS, 2e-9),
        CAPTURED: Machine(2e-4, 2e-12, 1e-9),
        DEALER: Machine(6e-5, 2e-12, 4e-10, 4e-10),
    },
    PEER_MEMORY: {
        PREFILL: Machine(3e-3, card_seconds.MANY_ROWS, 1e-9),
        CAPTURED: Machine(5e-5, 2e-12, 5e-10),
        DEALER: Machine(5e-5, 2e-12, 4e-10, 4e-10),
    },
}
WORDS = ["cost", "--model", "shipped", "--prompt-tokens", "40", "--new-tokens", "4", "--json"]


def constants(made: Machine) -> dict:
    return {name: getattr(made, name) for name in CONSTANTS}


def named(sets: dict) -> dict:
    return {which: constants(made) for which, made in sets.items()}


@pytest.fixture
def cards(monkeypatch, tmp_path):
    """The file of constants, in which there is one card of 80 GB."""
    path = tmp_path / "cards.json"
    monkeypatch.setattr(machine, "CARDS", path)
    known = {"constants": {links: named(sets) for links, sets in MADE_OF.items()}, "device": "cuda", "made_by": []}
    path.write_text(json.dumps({"A Card": {**known, "memory": 80 * 10**9}}))
    return path


def asked(capsys, *more):
    assert main([*WORDS, *more]) == 0
    said = capsys.readouterr()
    return said.err.splitlines(), json.loads(said.out)


def test_a_card_has_a_set_for_each_phase(cards):
    sockets, peer = machine.card("A Card"), machine.card("A Card", peer_memory=True)
    for found, links in ((sockets, SOCKETS), (peer, PEER_MEMORY)):
        assert constants(found.of("decode")) == constants(MADE_OF[links][CAPTURED])
        for each in (found.of("prefill"), found.of("load"), found.from_python().of("decode")):
            assert constants(each) == constants(MADE_OF[links][PREFILL])
    assert sockets.dealing(10, {"products": 10**9, "material": 10**6}) == pytest.approx(6e-4 + 2e-3 + 4e-4)
    with pytest.raises(machine.UsageError, match="nothing is known of how fast 'Another' is; there are constants of"):
        machine.card("Another")


def test_a_prediction_is_its_counts_times_the_constants(cards, capsys):
    plan = Plan(40, 4, padded=256)
    counts = card_seconds.counted(plan)

    def expected(what, which, links=SOCKETS):
        made = MADE_OF[links][which]
        return sum(count * getattr(made, name) for count, name in zip(counts[what], CONSTANTS, strict=True))

    said, found = asked(capsys, "--device", "cuda")
    assert found["machine"] == "A Card, the parties on cuda and sockets," and found["plan"]["padded"] == 256
    assert found["prefill"]["seconds"] == pytest.approx(expected("prefill", PREFILL))
    assert found["per_token"]["seconds"] == pytest.approx(expected("decode", CAPTURED))
    assert found["per_token"]["dealer_seconds"] == pytest.approx(expected("dealer", DEALER))
    streamed = found["per_token"]["seconds"] + found["per_token"]["dealer_seconds"]
    assert any(line.startswith("a token") and f" s, {streamed:.3g} s streamed" in line for line in said)
    _, peer = asked(capsys, "--device", "cuda:0,cuda:1,cuda:0", "--peer-memory")
    assert peer["per_token"]["seconds"] == pytest.approx(expected("decode", CAPTURED, PEER_MEMORY))


def test_what_is_not_captured_runs_from_python(cards, capsys):
    """Steps without room, and those of a policy that acts."""
    for more in (["--padded", "0"], ["--policy", "quest"]):
        _, found = asked(capsys, "--device", "cuda", *more)
        assert found["per_token"]["seconds"] > 140 * MADE_OF[SOCKETS][PREFILL].round


def test_a_party_on_a_processor_takes_a_processors_seconds(cards, capsys):
    said, found = asked(capsys, "--device", "cuda,cpu,cuda")
    assert found["machine"] == "a core a party" and any("s to deal)" in line for line in said)


def test_what_its_cards_cannot_hold_is_refused_behind_the_figures(cards, capsys):
    words = ["--hidden", "4096", "--heads", "32", "--ffn", "11008", "--layers", "32", "--prompt-tokens", "5"]
    assert main(["cost", *words, "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert "a token: " in said.err and "weights and caches (owner 27.0 GB, client " in said.err
    assert "cuda has 80.0 GB left; ask for less" in said.err
    assert main(["cost", *words, "--device", "cuda:0,cuda:1,cuda:2"]) == 0


def test_a_card_of_this_machine_is_the_one_that_is_asked_for(cards, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Another")
    assert main([*WORDS, "--device", "cuda"]) == 2
    assert "how fast 'Another' is" in capsys.readouterr().err
    assert main([*WORDS, "--device", "cuda:1"]) == 2
    assert "the last of this machine's GPUs is cuda:0; name another" in capsys.readouterr().err


def test_the_file_of_this_program_is_read():
    for name in machine.known():
        for peer_memory in (False, True):
            found = predict(
                LlamaConfig.from_folder(SHIPPED), Plan(20, 2, padded=256), None, machine.card(name, peer_memory)
            )
            assert 0 < found.phase("decode")["seconds"] < found.phase("prefill")["seconds"] < 60


@pytest.fixture
def command(monkeypatch, tmp_path, cards):
    """Runs the command on a card whose runs take what ``MADE_OF`` says, but for a factor of checked ones; returns the
    file that it keeps, and how many were measured."""
    made = []
    monkeypatch.setattr(
        card_seconds, "SHAPES", {"a": Shape(32, 4, 2, 48, kv_len=20), "b": Shape(256, 4, 4, 96, kv_len=9)}
    )
    monkeypatch.setattr(card_seconds, "CHECKED", {"c": Shape(64, 4, 4, 400, layers=2, kv_len=40)})
    monkeypatch.setattr(card_seconds, "PROMPTS", (16, 60, 300))
    monkeypatch.setattr(card_seconds, "CHECKED_PROMPTS", (30,))
    monkeypatch.setattr(card_seconds, "counted", functools.cache(card_seconds.counted))
    monkeypatch.setattr(provenance, "card", lambda: "A Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("Card", (), {"total_memory": 9})())

    def run(*words, factor=1.0):
        def measured(device, links, works):
            sets = {what: MADE_OF[links][which] for what, which in card_seconds.SETS.items()}
            for name, work in works.items():
                made.append(name)
                times = factor if name in card_seconds.works("checked") else 1.0
                yield (
                    name,
                    {
                        what: times * sum(c * getattr(sets[what], n) for c, n in zip(counts, CONSTANTS, strict=True))
                        for what, counts in card_seconds.counted(work).items()
                    },
                )

        monkeypatch.setattr(card_seconds, "measured", measured)
        monkeypatch.setattr(sys, "argv", ["card_seconds", "--json", str(tmp_path / "seconds.json"), *words])
        made.clear()
        return card_seconds.main(), list(made)

    return run


def test_constants_come_back_and_a_prediction_beyond_a_quarter_is_an_error(command, cards, capsys):
    cards.unlink()
    code, made = command("--save", "--runs", "fitted", "checked")
    assert code == 0 and len(made) == 2 * (2 + 3 + 1 + 1)
    known = json.loads(cards.read_text())["A Card"]
    assert known["memory"] == 9 and known["device"] == "cuda" and known["made_by"][0]["card"] == "A Card"
    for links in MADE_OF:
        for which in MADE_OF[links]:
            assert known["constants"][links][which] == pytest.approx(constants(MADE_OF[links][which]), rel=0.02)
    assert isinstance(machine.card("A Card"), Card)
    assert command("--runs", "fitted", "checked")[1] == [], "nothing is measured twice"
    for factor, code in ((1.2, 0), (1.4, 1)):
        (cards.parent / "seconds.json").unlink()
        assert command("--runs", "checked", factor=factor)[0] == code
    said = capsys.readouterr().err
    assert "predictions beyond 25%: c, sockets, captured: " in said and "s measured" in said
