"""What another party says, against whoever hears it: one clear line, at once, and nothing made of it.

The attacks of a review, as scripts: each was a hang, a traceback or exhausted memory before.
"""

from dataclasses import asdict

import pytest
import torch
from hostile import LARGE, SIZES, one_line
from transports import ROLES, socket_pair

from crypten_llm import limits, memory
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links.transport import Transport
from crypten_llm.models.config import LlamaConfig
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session import messages
from crypten_llm.session.bench import Shape
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan, Turn


@pytest.fixture
def dealer():
    """A party that follows the program, and the links of the two that speak to it: (party, by role)."""
    sockets, theirs = {}, {}
    for rank in (OWNER, CLIENT):
        sockets[rank], theirs[rank] = socket_pair()
    transport = Transport(2, ROLES, sockets, timeout=1.0)
    party = Dealer(Engine(transport), transport, compute_parties=2)
    others = {rank: _Speaker(sock) for rank, sock in theirs.items()}
    yield party, others
    transport.close()
    for other in others.values():
        other.close()


class Engine:
    """Stands for ``wire``: all that is refused is refused before an engine is asked for anything."""

    name, dealer_follows, rank = WireEngine.name, True, 2
    device, holds, config = torch.device("cpu"), WireEngine.holds, WireConfig()

    def __init__(self, transport):
        self.meter = transport.meter

    def expect(self, *arguments):
        pass

    def check_policy(self, policy):
        pass


class Dealer(Party):
    def start_request(self):
        self.requests += 1


class _Speaker:
    """Says what it likes on one link."""

    def __init__(self, sock):
        self.transport = Transport(0, ("any", "dealer"), {1: sock}, timeout=1.0)

    def say(self, message):
        self.transport.send_json(1, message)

    def close(self):
        self.transport.close()


def announced(**changes):
    return {"verb": "model", "config": {**SIZES, **changes}, "norm_scales": {}}


@pytest.mark.parametrize(("changes", "words"), LARGE, ids=[next(iter(changes)) for changes, _ in LARGE])
def test_an_announced_model_of_any_size_is_refused_at_once(dealer, changes, words):
    party, others = dealer
    others[OWNER].say(announced(**changes))
    with one_line(PartyError, r"rank 0 \(owner\) asks for what cannot be run here: .*" + words):
        party.load()


def test_a_model_that_this_machine_cannot_hold_is_refused_before_it_is_made(dealer, monkeypatch):
    party, others = dealer
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    others[OWNER].say(announced())
    with one_line(PartyError, r"asks for what cannot be run here: a model of [\d,]+ parameters needs .* has 10.0 KB"):
        party.load()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"verb": "model", "config": [], "norm_scales": {}}, "Expected `object`, got `array` - at `\\$.config`"),
        ({"verb": "model", "norm_scales": {}}, "missing required field `config`"),
        ({**announced(), "norm_scales": {"a": "b"}}, "Expected `float`, got `str`"),
        ({**announced(), "norm_scales": {"a": -1.0}}, "norm_scales"),
        ({**announced(), "tokens": "\x1b[31m"}, "tokens"),
        ({**announced(), "outside": "x" * 5000}, "outside"),
        ({**announced(), "more": 1}, "unknown field `more`"),
        ({"verb": "loading", "loaded": "1", "total": 2}, "Expected `int`, got `str`"),
        ({"verb": "\x1b[31m"}, r"Invalid value '\\x1b\[31m'"),
        ([], "Expected `object`, got `array`"),
        (None, "Expected `object`, got `null`"),
    ],
)
def test_an_announcement_of_another_kind(dealer, message, words):
    party, others = dealer
    others[OWNER].say(message)
    with one_line(PartyError, r"rank 0 \(owner\) sent something else than what is due \(.*" + words):
        party.load()


def test_scales_of_norms_that_there_are_not(dealer):
    party, others = dealer
    others[OWNER].say({**announced(), "norm_scales": {"model.layers.99.input_layernorm.weight": 4.0}})
    with one_line(PartyError, "it gives a scale for model.layers.99.input_layernorm.weight, which"):
        party.load()


PLAN = asdict(Plan(3, 2))
WRONG_PLANS = [
    ({"prompt_tokens": 10**6}, "the prompt has 1000000 tokens and 2 more are asked for"),
    ({"prompt_tokens": 10**10}, "Expected `int` <= 16777216 - at `\\$.plans\\[0\\].prompt_tokens`"),
    ({"prompt_tokens": 0}, "Expected `int` >= 1"),
    ({"prompt_tokens": 3.0}, "Expected `int`, got `float`"),
    ({"prompt_tokens": True}, "Expected `int`, got `bool`"),
    ({"prompt_tokens": None}, "Expected `int`, got `null`"),
    ({"chunk": 0}, "chunk"),
    ({"chunk": "a"}, "chunk"),
    ({"max_new_tokens": 2**63}, "max_new_tokens"),
    ({"hide_length": "yes"}, "hide_length"),
    ({"policy": "nothing"}, "unknown policy 'nothing'"),
    ({"policy": "x" * 2000}, "policy"),
    ({"policy": "h2o(\x1b[31m=1)"}, "policy h2o has no setting"),
    (
        {"policy": "locret(weights=/etc/passwd#0123456789ab)"},
        "weights is '/etc/passwd#0123456789ab'; it must be shipped",
    ),
    ({"public_prefix": 7}, "public_prefix"),
    ({"public_prefix": [-1]}, "public_prefix"),
    ({"public_prefix": [1] * 100}, "the prompt has 103 tokens"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_PLANS, ids=[str(changes)[:40] for changes, _ in WRONG_PLANS])
def test_a_plan_of_another_kind(dealer, changes, words):
    party, others = dealer
    others[CLIENT].say({"verb": "generate", "plans": [{**PLAN, **changes}]})
    refuse(party, words)


def refuse(party, words):
    party.model = Model()
    with one_line(PartyError, r"rank 1 \(client\) .*" + words):
        party.serve()


class Model:
    config = LlamaConfig.from_dict(SIZES)
    length = 0

    def new_cache(self):
        return self  # an empty one


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"verb": "generate", "plans": []}, "length >= 1"),
        ({"verb": "generate", "plans": [PLAN] * 2000}, "length <= 1024"),
        ({"verb": "generate", "plans": [{"prompt_tokens": 1}]}, "missing required field `max_new_tokens`"),
        ({"verb": "generate"}, "missing required field `plans`"),
        ({"verb": "generate", "plans": [PLAN], "turns": [{"conversation": "a"}]}, "Expected `int`, got `str`"),
        ({"verb": "generate", "plans": [PLAN], "turns": [{"conversation": 1, "cached_tokens": 9}]}, "0 are here"),
        ({"verb": "generate", "plans": [PLAN], "turns": [None, None]}, "2 turns are given for 1 prompts"),
        ({"verb": "generate", "plans": [PLAN] * 2, "turns": [{"conversation": 1}] * 2}, "the same conversation"),
        ({"verb": "forget"}, "missing required field `conversation`"),
        ({"verb": "forget", "conversation": []}, "Expected `int`, got `array`"),
        ({"verb": "bench", "shape": {}}, "missing required field"),
        ({"verb": "eval"}, "Invalid value 'eval'"),
        ({}, "missing required field `verb`"),
        ("close", "Expected `object`, got `str`"),
        ({"verb": "load", "model": "/etc/passwd"}, "unknown field `model`"),
    ],
)
def test_a_request_of_another_kind(dealer, message, words):
    party, others = dealer
    others[CLIENT].say(message)
    refuse(party, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab": 2**31}, "vocab_size is 2147483648"),
        ({"hidden": 2**14, "heads": 64, "kv_heads": 64, "ffn": 2**16, "layers": 900}, "a bench of these sizes needs"),
        ({"kv_len": 2**24, "layers": 1000, "hidden": 2**10}, "a bench of these sizes needs .* of memory"),
        ({"hidden": 0}, "hidden_size is 0"),
        ({"heads": 7}, "hidden_size is 64; it must be a multiple of num_attention_heads 7"),
    ],
)
def test_a_bench_of_any_size(dealer, changes, words):
    party, others = dealer
    shape = {**asdict(Shape(hidden=64, heads=4, kv_heads=4, ffn=64)), **changes}
    others[CLIENT].say({"verb": "bench", "shape": shape})
    refuse(party, words)


def test_a_prompt_that_this_machine_cannot_hold(dealer, monkeypatch):
    party, others = dealer
    others[CLIENT].say(messages.Generate((Plan(60, 2), Plan(60, 2))))
    monkeypatch.setattr(memory, "available", lambda: 1000)
    refuse(party, "2 prompts of 120 tokens needs .* and this machine has 1.0 KB left")


def test_no_end_of_conversations(dealer):
    party, _ = dealer
    party.model = Model()
    for number in range(limits.CONVERSATIONS):
        party.cache(Turn(number))
    with pytest.raises(UsageError, match="keeps 256 conversations already"):
        party.cache(Turn(limits.CONVERSATIONS))


@pytest.mark.parametrize("changes", [{"rank": "0"}, {"table": [{}]}, {"table": 1}, {"peak_bytes": -1}])
def test_counters_of_another_kind(mesh, changes):
    owner, client, _ = mesh(3)
    party = Party(Engine(client), client, compute_parties=2)
    owner.send_json(1, {"rank": 1, "table": [], "peak_bytes": 0, **changes})
    with one_line(PartyError, "sent something else than what is due"):
        party.collect_statistics()
