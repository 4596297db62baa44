"""Agreement of choices: short runs of both engines, recall, the tables."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import eviction
from crypten_llm.commands.trace import trace
from crypten_llm.engines.plain.engine import PlainEngine
from experiments.measure import eviction_agreement
from experiments.measure.eviction_agreement import SHIPPED, loaded, main, measure, observe, recall, summary

IDS = list(range(40, 96))


def test_recall_is_by_head_and_of_the_first():
    clear, private = [torch.tensor([[0, 1, 2], [3, 4, 5]])], [torch.tensor([[2, 1, 0], [0, 1, 5]])]
    assert recall(clear, private) == (4, 6)


def test_both_engines_on_a_short_prompt():
    policies = ("mpcache(coarse=8,fine=4,least=0)", "lazyeviction(window=1,alpha=0.01)", "locret(budget=0.6)")
    _, made = measure(("a prompt", policies, IDS, 2))
    for policy, found in made.items():
        assert found["tokens"] == 56 and found["operations"] > 0 and found["off"] == found["beyond"] == 0, policy
        assert 0.99 * found["taken"] <= found["agreed"] <= found["taken"] != 0
        assert 0.99 * found["kept"] <= found["kept_found"] <= found["kept"] and 0 < found["mass"] < 1
        assert found["mass_found"] == pytest.approx(found["mass"], rel=0.01)
        assert (found["over"] > 0) == policy.startswith("lazyeviction")
    assert made[policies[0]]["kept"] == 6 * 4 * 28


@pytest.mark.parametrize("policy", ["snapkv(budget=20,window=4)", "locret(budget=20,recent=3)", "quest(budget=32)"])
def test_a_prefill_that_is_shared_changes_nothing(policy):
    others = ["h2o(heavy=6,recent=6)", policy, "mikv(important=9)"]
    alone = trace(SHIPPED, eviction.parse(policy), IDS, 3)
    found = observe(loaded(PlainEngine()), others, IDS, 3)[policy]
    assert found.tokens == alone.token_ids[:3]
    records = found.judged.in_order
    for mine, other in zip(records, alone.layers, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(mine.kept, other.kept, strict=True))
        assert all(torch.equal(one, two) for one, two in zip(mine.attended, other.attended, strict=True))
        assert mine.mass == pytest.approx(other.mass, rel=1e-4)


def sample(agreed=100, beyond=0, found=50):
    return {
        **{"taken": 100, "agreed": agreed, "over": 0, "over_agreed": 0, "compared": 100, "beyond": beyond},
        **{"margin": 0.25, "operations": 7, "off": 0, "kept": 50, "kept_found": found, "attended": 0},
        **{"attended_found": 0, "mass": 0.5, "mass_found": 0.01 * found, "tokens": 60},
    }


def test_shares_are_of_all_indices_and_of_the_prompt_with_the_least():
    samples = {"h2o|a/64/6/0": sample(), "h2o|b/64/6/1": sample(agreed=98, beyond=1, found=49), "tova|c/64/6/0": {}}
    (row,) = summary(samples, ["h2o"])
    assert (row["prompts"], row["chosen"], row["the_same"]) == (2, "200", "99.00% (98.00%)")
    assert (row["up_to_ties"], row["kept"], row["attended"]) == ("99.50% (99.00%)", "99.00% (98.00%)", "–")
    assert row["wire's_over_plain's"] == "0.9900 (0.9800 to 1.0000)" and row["operations_off"] == "0 of 14"


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    path, asked = tmp_path / "found.json", []

    def measured(jobs, workers):
        asked.extend((name, policies) for name, policies, *_ in jobs)
        return [(name, {policy: sample() for policy in policies}) for name, policies, *_ in jobs]

    monkeypatch.setattr(eviction_agreement, "_measured", measured)
    for policies in (["h2o"], ["h2o", "tova"]):
        arguments = ["--length", "64", "--samples", "2", "--policies", *policies, "--json", str(path)]
        monkeypatch.setattr(sys, "argv", ["eviction_agreement", *arguments])
        main()
    names = ["one_hop/64/6/0", "passkey/64/6/1"]
    assert asked == [(name, ["h2o"]) for name in names] + [(name, ["tova"]) for name in names]
    assert len(json.loads(path.read_text("utf-8"))["samples"]) == 4
    assert capsys.readouterr().out.endswith(path.with_suffix(".md").read_text("utf-8"))
