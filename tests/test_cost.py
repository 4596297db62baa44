"""What engine ``cost`` counts is what the parties of engine ``wire`` count, to the byte."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from crypten_llm.commands import cli, cost
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.errors import UsageError
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.links.network import Network
from crypten_llm.models import checkpoint
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama
from crypten_llm.roles import CLIENT
from crypten_llm.session import bench
from crypten_llm.session.mode import Mode
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import Answer

SHIPPED = checkpoint.SHIPPED
ONLINE = ("rounds", "bytes_sent", "bytes_received")
DEALER = ("dealer_rounds", "dealer_bytes_sent", "dealer_bytes_received")


def by_kind(table: list[dict], phases=("prefill", "decode")) -> dict:
    """Online counters by phase and kind, without kinds that carry nothing."""
    found = {(row["phase"], row["kind"]): tuple(row[name] for name in ONLINE) for row in table}
    return {key: counts for key, counts in found.items() if any(counts) and key[0] in phases}


def dealer_by_phase(table: list[dict], phases=("prefill", "decode")) -> dict:
    """The dealer's counters by phase: frames do not end where operations do."""
    sums = {phase: Counter() for phase in phases}
    for row in table:
        if row["phase"] in phases:
            sums[row["phase"]].update({name: row[name] for name in DEALER})
    return sums


def generate(transport, folder, plan: Plan):
    """A whole session of one request: at the client the counters of the load and of the request; bytes of weights."""
    mode = Mode.parse(plan.reveal)
    config = mode.wire()
    party = Party(WireEngine(transport, config), transport, compute_parties=2, mode=mode)
    if not party.is_client:
        party.serve(folder)
        return held(party.model)
    party.request_load()
    loaded = party.engine.meter.table()
    for _ in party.request_generate(plan, Answer([3] * plan.prompt_tokens, lambda logits: 3)):
        pass
    tables = [entry["table"] for entry in party.collect_statistics()]
    party.close()
    return loaded, tables[:2], held(party.model)


def held(model) -> int:
    """Bytes of all tensors that this party keeps of its weights."""
    found = []
    for weight in model.parameters():
        for matrix in weight.matrices.values():
            found += [matrix.plain, matrix.hidden, matrix.mask]
        found.append(weight.value)
    return sum(tensor.nbytes for tensor in found if tensor is not None)


PLANS = [
    Plan(7, 3),
    Plan(40, 3, chunk=16),
    Plan(7, 3, reveal="tokens"),
    Plan(7, 3, reveal="tokens", temperature=0.7),
    Plan(7, 3, reveal="top-20"),
]


@pytest.mark.parametrize("plan", PLANS)
def test_generation_on_the_shipped_model(plan):
    at_owner, (loaded, measured, at_client), at_dealer = run_roles(lambda links: generate(links, SHIPPED, plan))
    prediction = cost.predict(LlamaConfig.from_folder(SHIPPED), plan)
    assert [memory["weights"] for memory in prediction.memory.values()] == [at_owner, at_client, at_dealer]
    counted = prediction.cost.ranks
    for rank, table in enumerate(measured):
        assert by_kind(counted[rank]["table"]) == by_kind(table)
        assert dealer_by_phase(counted[rank]["table"]) == dealer_by_phase(table)
    weights = ("load", "weights")
    assert by_kind(counted[CLIENT]["table"], ["load"])[weights] == by_kind(loaded, ["load"])[weights]


def measure_bench(transport, shape: bench.Shape):
    party = Party(WireEngine(transport), transport, compute_parties=2)
    bench.run(party, shape)
    return party.engine.meter.table()


@pytest.mark.parametrize(
    "shape",
    [
        bench.Shape(64, 4, 2, 96, layers=3, kv_len=33, steps=2),
        bench.Shape(32, 2, 2, 400),
        bench.Shape(32, 2, 2, 40, layers=2, kv_len=9, steps=1, vocab=130),
    ],
)
def test_bench(shape):
    measured = run_roles(lambda transport: measure_bench(transport, shape))
    counted = cost.count_bench(shape).ranks
    for rank in range(2):
        assert by_kind(counted[rank]["table"]) == by_kind(measured[rank])
        assert dealer_by_phase(counted[rank]["table"]) == dealer_by_phase(measured[rank])


def test_layers_counted_once_are_all_counted(monkeypatch):
    """Also where a section's material ends in the middle of a frame, and on the way through several chunks."""
    config = LlamaConfig.from_sizes(hidden=64, heads=4, kv_heads=2, ffn=160, layers=5, vocab=97, context=64)
    plan = Plan(40, max_new_tokens=2, chunk=16)
    quick = cost.predict(config, plan)
    monkeypatch.setattr(cost._AlikeLayers, "through", Llama.through)
    slow = cost.predict(config, plan)
    assert quick.cost.ranks == slow.cost.ranks
    assert quick.memory == slow.memory


def test_memory_of_what_a_policy_keeps_beside_the_cache():
    """``longcache`` keeps the keys a second time, as they were before the rotary embedding; half as much again."""
    config = LlamaConfig.from_sizes(hidden=32, heads=4, kv_heads=2, ffn=48, layers=3, vocab=8, context=256, tied=True)

    def cache(policy):
        memory = cost.predict(config, Plan(100, 2, policy=policy)).memory
        return memory["client"]["cache"], memory["dealer"]["cache"]

    full, numbers = cache("full"), 101 * 2 * 8 * 3
    assert full == (2 * numbers * 16, 2 * numbers * 8)
    assert cache("longcache") == (3 * numbers * 16, 3 * numbers * 8)
    pages = 100 // 16 * 2 * 8 * 3  # numbers of their largest keys; as many of their smallest
    assert cache("quest(page=16,budget=32,dense=0)")[0] == full[0] + 2 * pages * 16


def test_cache_of_a_llama_2_7b():
    """Its size is the architecture's: rows of keys and values in every layer, two words a number at a party."""
    config = LlamaConfig.from_sizes(hidden=4096, heads=32, kv_heads=32, ffn=11008, layers=32, vocab=32000, context=4096)
    prediction = cost.predict(config, Plan(300, max_new_tokens=2))
    assert prediction.memory["client"]["cache"] == 301 * 4096 * 2 * 32 * 16
    assert prediction.memory["dealer"]["cache"] == 301 * 4096 * 2 * 32 * 8


def test_a_slow_network_adds_its_delays():
    config = LlamaConfig.from_folder(SHIPPED)
    near, far = (cost.predict(config, Plan(5, 2), network) for network in (None, Network(rtt_ms=100, mbit=8)))
    assert near.cost.rounds() == far.cost.rounds()
    rounds, sent = far.cost.rounds(("prefill",)), far.cost.bytes_sent(("prefill",))[CLIENT]
    assert far.phase("prefill")["seconds"] - near.phase("prefill")["seconds"] == pytest.approx(
        rounds * 0.05 + sent / 1e6, rel=0.02
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "shipped"], "--prompt-tokens"),
        (["--prompt-tokens", "5"], "which model? give one of --model M, --config F"),
        (["--prompt-tokens", "5", "--model", "shipped", "--hidden", "64"], "which model?"),
        (["--prompt-tokens", "5", "--hidden", "64"], "--heads is missing"),
        (["--prompt-tokens", "5", "--config", "/nowhere/config.json"], "/nowhere/config.json: cannot be read"),
        (["--prompt-tokens", "5", "--model", "shipped", "--new-tokens", "0"], "new_tokens is 0"),
        (["--prompt-tokens", "5", "--model", "shipped", "--chunk", "0"], "chunk is 0"),
        (["--prompt-tokens", "9999", "--model", "shipped"], "the model's context is 4096"),
        (["--prompt-tokens", "5", "--model", "shipped", "--policy", "ful"], "ful"),
        (["--prompt-tokens", "5", "--model", "shipped", "--network", "moon"], "network 'moon' is not known"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert cli.main(["cost", *arguments]) == UsageError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_command(capsys):
    assert cli.main(["cost", "--config", str(SHIPPED / "config.json"), "--prompt-tokens", "9", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    expected = cost.predict(LlamaConfig.from_folder(SHIPPED), Plan(9, 2)).to_dict()
    assert found["per_token"] == expected["per_token"]
    assert found["prefill"]["bytes_sent"] == expected["prefill"]["bytes_sent"]
    assert "estimated" in err and "memory of weights" in err
