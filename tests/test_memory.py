"""What a process may still take, and work that is refused because it would not fit."""

import json
import resource

import pytest
import torch

from crypten_llm import memory
from crypten_llm.commands.doctor import TINY
from crypten_llm.engines.base import Engine, Held
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig
from crypten_llm.roles import CLIENT, DEALER, OWNER
from crypten_llm.session import party, sizes
from crypten_llm.session.bench import Shape
from crypten_llm.session.fits import Fits
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan

SMALL = LlamaConfig.from_sizes(hidden=32, heads=4, kv_heads=2, ffn=48, layers=3, vocab=97, context=4096)


@pytest.mark.parametrize(
    ("system", "group", "process", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable: 8 kB\n", "max", resource.RLIM_INFINITY, 8192),
        ("MemAvailable: 8 kB\n", "4096\n", resource.RLIM_INFINITY, 4096),
        ("MemAvailable: 8 kB\n", None, 1000, 1000),
    ],
)
def test_the_least_of_what_system_container_and_process_allow(tmp_path, monkeypatch, system, group, process, expected):
    (tmp_path / "meminfo").write_text(system)
    if group is not None:
        (tmp_path / "max").write_text(group)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUPS", (str(tmp_path / "max"), str(tmp_path / "absent")))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (process, process))
    assert memory.available() == expected


def test_a_system_that_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "absent")
    assert memory.available() > 1 << 20


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    memory.check(1_000_000, "this")
    with pytest.raises(UsageError, match="^this needs 1.5 MB of memory and this machine has 1.0 MB left; ask for less"):
        memory.check(1_500_000, "this")


def test_predictions_count_from_below():
    """Caches of prompts, and the scores of a pass; a policy that cuts prompts keeps no more than it says."""
    row = 2 * 2 * 8 * 8
    cache, scores = 3 * 100 * row, 4 * 50 * 50 * 8
    assert sizes.of_requests(SMALL, [Plan(100, 1, chunk=50)], 8) == cache + scores
    assert sizes.of_requests(SMALL, [Plan(60, 1, chunk=50, public_prefix=(1,) * 40)] * 2, 8) == (2 * (cache + scores))
    assert sizes.of_token(SMALL, 8) == 3 * row
    assert sizes.of_requests(SMALL, [Plan(100, 1, chunk=50, policy="locret(budget=9)")], 8) == scores
    assert sizes.of_requests(SMALL, [Plan(100, 1)], 0) == 0
    shape = Shape(hidden=32, heads=4, kv_heads=2, ffn=48, layers=3, kv_len=10, vocab=97)
    cached = 3 * 10 * 2 * 2 * 8
    assert sizes.of_bench(shape, Held(4, 16)) == 4 * shape.config().parameters + 16 * cached


def test_a_window_bounds_a_cache():
    config = LlamaConfig.from_dict(
        {"model_type": "mistral", "sliding_window": 16, "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
        | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    )
    assert sizes.of_requests(config, [Plan(100, 1, chunk=1)], 8) == 3 * 16 * 2 * 2 * 8 * 8 + 4 * 8


class Elsewhere(Engine):
    """On a card with ``free`` bytes, of which the driver tells 1,000 fewer that torch keeps unused."""

    device = torch.device("cuda:0")
    holds, config = WireEngine.holds, WireConfig()


@pytest.fixture
def card(monkeypatch):
    def make(free):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 1000, 1 << 40))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4000)
        monkeypatch.setattr(Elsewhere, "__abstractmethods__", frozenset())
        return Elsewhere()

    return make


@pytest.mark.parametrize(
    ("rank", "sharing", "bytes_each"),
    [
        (OWNER, (), 4),
        (CLIENT, (), 8),
        (OWNER, (OWNER, CLIENT, DEALER), 4 + 8 + 8),  # of which none has taken its part when the owner asks
        (CLIENT, (OWNER, CLIENT, DEALER), 8 + 8),
        (CLIENT, (CLIENT, DEALER), 8 + 8),
        (DEALER, (CLIENT, DEALER), 8),
    ],
)
def test_a_model_has_to_fit_the_card_of_those_who_share_it(card, rank, sharing, bytes_each):
    needed = SMALL.parameters * bytes_each
    Fits(card(needed), rank, 2, sharing).model(SMALL)
    with pytest.raises(
        UsageError, match=r"of memory and cuda:0 has .* left; ask for less, or give parties a card each"
    ):
        Fits(card(needed - 1), rank, 2, sharing).model(SMALL)


def test_what_each_of_them_needs_is_said(card):
    large = LlamaConfig.from_sizes(hidden=4096, heads=32, kv_heads=32, ffn=11008, layers=32, vocab=32000, context=2048)
    with pytest.raises(UsageError) as raised:
        Fits(card(80 * 10**9), OWNER, 2, (OWNER, CLIENT, DEALER)).model(large)
    assert str(raised.value).startswith(
        "a model of 6,738,415,616 parameters (owner 27.0 GB, client 53.9 GB, dealer 53.9 GB) needs 134.8 GB of "
        "memory and cuda:0 has 80.0 GB left; "
    )


def test_caches_and_a_bench_have_to_fit_too(card):
    """Of a cached number a party has two words, the dealer one."""
    plan, shape = Plan(100, 1, chunk=50), Shape(hidden=32, heads=4, kv_heads=2, ffn=48, layers=3, kv_len=10, vocab=97)
    needed = [sum(sizes.of_requests(SMALL, [plan], cached) for cached in (16, 8))]
    needed.append(sum(sizes.of_bench(shape, held) for held in (Held(8, 16), Held(8, 8))))
    for count, ask in zip(
        needed, (lambda fits: fits.requests(SMALL, [plan]), lambda fits: fits.bench(shape)), strict=True
    ):
        ask(Fits(card(count), CLIENT, 2, (CLIENT, DEALER)))
        with pytest.raises(UsageError, match="client .*, dealer .* needs"):
            ask(Fits(card(count - 1), CLIENT, 2, (CLIENT, DEALER)))


def test_parties_on_processors_count_for_themselves(monkeypatch):
    """What swaps is no error; each is held against what there is."""
    monkeypatch.setattr(memory, "available", lambda: 4 * SMALL.parameters)
    Fits(PlainEngine(), OWNER, 1, (OWNER, CLIENT, DEALER)).model(SMALL)
    monkeypatch.setattr(memory, "available", lambda: 4 * SMALL.parameters - 1)
    with pytest.raises(UsageError, match="this machine has .* left; ask for less, or use a machine with more"):
        Fits(PlainEngine(), OWNER, 1).model(SMALL)


def test_an_owner_asks_before_it_reads_its_weights(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))

    def unread(*given):
        raise AssertionError("nothing is read that does not fit")

    monkeypatch.setattr(party, "read_weights", unread)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(UsageError, match="a model of .* parameters needs .* of memory"):
        Party(PlainEngine()).load(tmp_path)
