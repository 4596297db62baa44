"""Counts of eviction: steps that are not counted themselves, all layers, the tables, runs that go on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from crypten_llm.commands.cost import count_bench, predict
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan
from experiments.measure import eviction_cost
from experiments.measure.eviction_cost import (
    CURVE,
    DYNAMIC,
    FULL,
    MODELS,
    STATIC,
    TRAINED,
    key,
    others,
    pays,
    step_table,
)
from experiments.measure.eviction_counts import ATTENTION, CHOICE, count, fills, layers
from experiments.measure.eviction_time import measured_table

TINY = Shape(hidden=32, heads=4, kv_heads=2, ffn=48, layers=6, kv_len=128)
SMALL = "mpcache(coarse=8,fine=4,least=0)"


@pytest.mark.parametrize(
    ("policy", "rounds"),
    [
        *(("full", 0), (SMALL, 0), ("quest(page=8,budget=0.25)", 0), ("h2o", 0)),
        ("infllm(block=8,blocks=2,initial=4,local=16)", 0),
        ("lazyeviction(window=4)", 1),  # begins with the second step, not with the first
    ],
)
def test_a_mean_step_is_that_of_many_steps(policy, rounds):
    """Beside ``predict``, which runs as many steps as a cluster has rows, on a cache that grows."""
    found = count(replace(TINY, policy=policy))
    sizes = {"hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "layers": 6}
    config = LlamaConfig.from_sizes(**sizes, vocab=8, context=256, tied=True)
    table = predict(config, Plan(128, 9, policy=policy)).cost.table()
    rows = [row for row in table if row["phase"] == "decode" and row["kind"] in ATTENTION]
    assert float(found.total("rounds")) == pytest.approx(sum(row["rounds"] for row in rows) / 8, abs=rounds, rel=0)
    assert float(found.total("online")) == pytest.approx(sum(row["bytes_sent"] for row in rows) / 4, rel=0.04)
    assert float(found.total("dealer")) == pytest.approx(sum(row["dealer_bytes"] for row in rows) / 8, rel=0.04)


@pytest.mark.parametrize("policy", ["full", SMALL, "h2o", "mpcache_spread(budget=0.2,block=8,ends=6)"])
@pytest.mark.parametrize("count_of_layers", [7, 10])
def test_every_layer_is_counted(policy, count_of_layers):
    shape = replace(TINY, layers=count_of_layers, policy=policy)
    found = layers(shape)
    real = count_bench(replace(shape, steps=1))
    everything = {kind for kind, _ in found.counts}
    assert found.total("online", everything) == sum(real.bytes_sent(("decode",)))
    assert found.total("dealer", everything) == real.dealer_bytes(("decode",))


def test_layers_that_search_are_counted_where_they_are():
    """Of ten layers, those in the middle that the policy names."""
    shape = replace(TINY, layers=10, policy="mpcache_spread(budget=0.2,block=8,ends=6,lower=0.5,upper=0.2)")
    one = replace(shape, layers=1)  # in one layer it searches
    assert layers(shape).total("rounds", {"selection"}) == 3 * layers(one).total("rounds", {"selection"}) > 0


@pytest.mark.parametrize(
    "policy, found",
    [(SMALL, (8, 128, 135)), ("quest(page=8,budget=0.25)", (8, 129, 128)), ("h2o", (1, 128, 128)), (STATIC, None)],
)
def test_lengths_at_which_a_cluster_fills(policy, found):
    assert fills(policy, 128) == (found or (1, 128, 128))
    if found and found[0] > 1:
        plain, filling = (layers(replace(TINY, policy=policy, kv_len=length)) for length in found[1:])
        assert filling.total("rounds", CHOICE) > plain.total("rounds", CHOICE) > 0


@pytest.mark.parametrize("policy", [name for name in others("shipped") if not name.startswith("lazyeviction")])
def test_every_policy_that_is_compared_can_be_counted(policy):
    found = count(replace(MODELS["shipped"], kv_len=512, policy=policy))
    assert found.total("rounds") > 0 and found.cached > 0
    chooses = policy.startswith(("quest", "infllm", "longcache", "mpcache_spread"))
    assert (found.total("online", CHOICE) > 0) == chooses
    assert (found.summaries > 0) == (chooses or policy == "attention_gate")  # what mikv makes is the cache itself


def test_trained_policies_are_counted_for_the_model_they_were_trained_on():
    assert set(TRAINED) & set(others("shipped")) == set(TRAINED)
    assert not set(TRAINED) & set(others("Llama-3-8B"))


def test_choice_is_part_of_attention_and_static_eviction_halves_the_cache():
    full, static, found = (count(replace(TINY, policy=policy)) for policy in ("full", STATIC, SMALL))
    assert full.total("online", CHOICE) == static.total("online", CHOICE) == 0 == full.summaries == static.summaries
    assert 0 < found.total("online", CHOICE) < found.total("online") and found.summaries > 0
    assert full.cached == 6 * 2 * 129 * 16 and static.cached == found.cached == 6 * 2 * 65 * 16
    assert full.seconds("wan") > full.seconds("lan") > 0


def cell(online, rounds=1.0):
    return {
        **{"online_bytes": online, "dealer_bytes": 3 * online, "choice_bytes": online / 2, "rounds": rounds},
        **{"cache_bytes": 10, "summary_bytes": 0},
        "work": {"rounds": 100 * rounds, "online": 0, "products": 0, "material": 1e7 * online},
    }


def test_tables():
    cells = {key("shipped", length, FULL): cell(1000.0) for length in CURVE}
    cells |= {key("shipped", length, STATIC): cell(500.0) for length in CURVE}
    cells |= {key("shipped", length, DYNAMIC): cell(400.0 if 512 <= length <= 2048 else 600.0, 2.0) for length in CURVE}
    row = step_table("shipped", 512, (FULL, DYNAMIC, "h2o"), cells)[1]
    assert (row["times_fewer,_both"], row["online"], row["choice's_share"]) == (2.5, 2.5, "12%")
    found = pays("shipped", cells)[0]
    assert found["traffic_online"] == found["time,_LAN"] == "512 to 2,048" and found["time,_WAN"] == "nowhere"


def test_measured_ratios_are_paired(monkeypatch, tmp_path, capsys):
    """Full takes 2, 8, 6 s and the other 1, 2, 2 s: the median ratio is 3, not 6 / 2 of the medians of other pairs."""
    runs = {}
    for policy, seconds in ((FULL, (2.0, 8.0, 6.0)), (DYNAMIC, (1.0, 2.0, 2.0))):
        for repeat, taken in enumerate(seconds):
            traffic = dict.fromkeys(("rounds", "attention_rounds", "attention_online_bytes"), 3)
            traffic |= {"online_bytes": 100 * len(policy), "dealer_bytes": 7}
            run = {"engine": "wire", "tokens": 512, "policy": policy, "seconds": taken, "attention_seconds": taken}
            runs[f"wire/5/shipped/512/{policy}/{repeat}"] = run | traffic
    row = measured_table(runs, "full")[1]
    assert (row["times_faster"], row["ms_a_step"], row["repeats"], row["fewer_online"]) == (3.0, 2000.0, 3, 0.57)
    path = tmp_path / "time.json"
    path.write_text(json.dumps({"runs": runs}), "utf-8")
    monkeypatch.setattr(eviction_cost, "PrivateLlama", None)  # nothing is left to run
    arguments = ["--measure", "--lengths", "512", "--policies", FULL, DYNAMIC, "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["eviction_cost", *arguments])
    eviction_cost.main()
    assert path.with_suffix(".md").read_text("utf-8") == capsys.readouterr().out
    assert json.loads(path.read_text("utf-8"))["runs"] == runs


def test_counts_go_on_where_they_stopped(monkeypatch, tmp_path):
    counted, path = [], tmp_path / "cost.json"
    monkeypatch.setattr(eviction_cost, "cell", lambda *entry: counted.append(entry) or cell(100.0))
    monkeypatch.setattr(eviction_cost, "prefill_cell", lambda *_: dict.fromkeys(_SUMS, 5))
    monkeypatch.setattr(eviction_cost, "parts", lambda *_: [{"policy": FULL, "part": "all", "rounds": 1}])
    monkeypatch.setattr(sys, "argv", ["eviction_cost", "--quick", "--json", str(path)])
    for expected in (3 * (2 + len(eviction_cost.DYNAMICS) + len(eviction_cost.others("shipped"))), 0):
        counted.clear()
        eviction_cost.main()
        assert len(counted) == expected and path.with_suffix(".png").stat().st_size > 10_000


_SUMS = [f"{part}_{what}" for part in ("attention", "eviction") for what in ("rounds", "bytes_sent", "dealer_bytes")]
