"""Simulated groups: passes add up, the load is what it says, the scaler keeps its rule; the command."""

import json
import random
import sys
from dataclasses import replace

import pytest
import yaml
from deployed import DEPLOY, of_kind

from crypten_llm.commands.cost import predict
from crypten_llm.errors import UsageError
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan
from experiments.measure import replicas
from experiments.replicas.costs import Costs, Pass, counted
from experiments.replicas.groups import Simulation
from experiments.replicas.load import Load, Request, requests
from experiments.replicas.scaler import FILE, REFUSALS, RUNNING, WAITING, Rule, Scaler, read
from experiments.replicas.stock import needed

SMALL = Shape(hidden=64, heads=4, kv_heads=2, ffn=128, layers=3, kv_len=32, vocab=256)
STEPS = [Pass(1.0 + 0.1 * b, 0.5, 10.0, 0.2) for b in range(2)]  # of one sequence and of two
COSTS = Costs(STEPS, {1: Pass(0.4, 0.3, 2.0, 0.2), 4: Pass(2.0, 3.0, 40.0, 0.2), 8: Pass(4.0, 6.0, 80.0, 0.2)}, chunk=4)
RULE = Rule({WAITING: 2.0, RUNNING: 4.0}, (1.0, 2, 60.0), (1, 60.0), 300.0, 1)


def test_passes_are_what_cost_predicts():
    costs = counted(SMALL, 40, 3, 16, None)
    config = replace(SMALL, kv_len=43).config()
    for tokens in (1, 16, 17, 32, 40):
        found = predict(config, Plan(tokens, 2, 16)).phase("prefill")
        begins = range(0, tokens, 16)
        parts = [costs.part(begin, min(begin + 16, tokens)) for begin in begins]
        assert sum(part.seconds for part in parts) == pytest.approx(found["seconds"])
        assert sum(part.dealing for part in parts) == pytest.approx(found["dealer_seconds"])
        assert sum(part.material for part in parts) == found["dealer_bytes"]
    assert costs.room == 3 and costs.step(1).seconds < costs.step(2).seconds < 2 * costs.step(1).seconds
    assert costs.scaled(2.0, 3.0).alone(16, 3) == pytest.approx(3 * costs.alone(16, 1) + 4 * costs.step(1).seconds)


def test_a_request_alone_and_one_that_joins():
    """By hand: chunks of four, a pass of 0.2 s of rounds that both share."""
    asked = [Request(0.0, 0, 8, 3, 9), Request(0.5, 0, 4, 1, 9)]
    outcome = Simulation(COSTS, asked, 1).run()
    # Chunks of 3 s at the dealer; then a token beside the second's chunk, where the dealer takes 3.5; then one alone.
    assert [asked[0].first, asked[1].first] == [6.0, 9.5]
    assert outcome.gaps == pytest.approx([3.5, 1.0]) and asked[0].ended == pytest.approx(10.5)
    stocked = [Request(0.0, 0, 8, 3, 9), Request(0.5, 0, 4, 1, 9)]
    later = Simulation(COSTS, stocked, 1, live=False).run()
    assert later.gaps == pytest.approx([2.0 + 1.0 - 0.2, 1.0]) and stocked[0].first == 4.0
    assert outcome.busy == pytest.approx(10.5) == outcome.seconds
    assert sum(size for _, _, size in outcome.dealt) == 80 + 40 + 2 * 10


def test_a_price_that_misses_the_deadline_is_refused():
    price = COSTS.alone(4, 3)
    asked = [Request(0.0, user, 4, 3, 3) for user in range(5)]
    Simulation(COSTS, asked, 1, deadline=2.5 * price).run()
    assert [request.refused for request in asked] == [False, False, True, True, True]
    assert all(request.ended <= 2.5 * price for request in asked if not request.refused)


def test_a_user_stays_with_its_group_and_no_longer():
    asked = [Request(float(when), user, 4, 1, 1) for when in range(0, 400, 20) for user in range(8)]

    def spread(affinity):
        simulation = Simulation(COSTS, asked, 4, affinity=affinity)
        went = {}
        chosen = simulation._chosen

        def noted(now, user):
            group = chosen(now, user)
            went.setdefault(user, set()).add(group.number)
            return group

        simulation._chosen = noted
        simulation.run()
        return [len(groups) for groups in went.values()]

    assert spread(60.0) == [1] * 8 and min(spread(0.0)) > 1


def test_the_load_is_bursty_and_the_same_for_a_seed():
    load, seconds = Load(rate=1.0), 40_000.0
    asked = requests(load, seconds, 3)
    assert requests(load, 500.0, 3) == requests(load, 500.0, 3) != requests(load, 500.0, 4)
    assert len(asked) / seconds == pytest.approx(load.rate, rel=0.15)
    counts = [0] * int(seconds / 60)
    for request in asked:
        counts[min(int(request.arrived / 60), len(counts) - 1)] += 1
    mean = sum(counts) / len(counts)
    spread = sum((count - mean) ** 2 for count in counts) / len(counts)
    assert spread > 5 * mean, "a Poisson process alone has as much as its mean"
    assert sum(request.answer for request in asked) / len(asked) == pytest.approx(load.answer, rel=0.15)
    assert max(request.prompt for request in asked) == load.longest


def test_the_scaler_grows_at_once_and_shrinks_late():
    scaler = Scaler(RULE, 16)
    idle = {WAITING: 0.0, RUNNING: 0.0}
    assert scaler.look(15, 1, {WAITING: 30.0, RUNNING: 8.0}) == 3, "two more at most"
    assert scaler.look(30, 3, {WAITING: 30.0, RUNNING: 8.0}) == 3, "no more within a minute"
    assert scaler.look(80, 3, {WAITING: 30.0, RUNNING: 8.0}) == 6, "twice as many"
    assert scaler.look(95, 6, {WAITING: 11.6, RUNNING: 8.0}) == 6, "within a tenth"
    assert scaler.look(200, 6, idle) == 6
    assert scaler.look(401, 6, idle) == 5 and scaler.look(416, 5, idle) == 5 and scaler.look(462, 5, idle) == 4
    assert Scaler(RULE, 2).look(15, 1, {WAITING: 99.0, RUNNING: 0.0}) == 2


def test_groups_follow_the_load_and_answer_what_they_have():
    asked = [Request(2.0 * number, number, 4, 2, 2) for number in range(200)]
    outcome = Simulation(COSTS, asked, 1, Scaler(replace(RULE, settle=60.0), 8), start=20.0).run()
    groups = [groups for _, groups, _ in outcome.looks]
    assert groups[0] == 2 < max(groups) <= 8 and groups[-1] < max(groups)
    assert all(request.ended > request.first > request.arrived for request in asked)


def test_the_rule_is_the_manifests():
    (scaler,) = of_kind("HorizontalPodAutoscaler", "client")
    rule = read()
    assert scaler == yaml.safe_load(FILE.read_text("utf-8")) and rule.targets.keys() == {WAITING, RUNNING, REFUSALS}
    assert rule.settle == scaler["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"]
    assert rule.targets[REFUSALS] == 0.05
    (endpoint,) = [each for each in of_kind("Service", "client") if each["metadata"]["name"] == "endpoint"]
    kept = endpoint["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"]
    assert kept == Simulation(COSTS, [], 1)._affinity


def test_a_pool_that_keeps_up_needs_a_stock_for_bursts_alone():
    even = [(float(second), 0.5, 100.0) for second in range(100)]
    assert needed(even, 100.0).dealers == 1 and needed(even, 100.0).stock == 100.0
    burst = [(0.0, 50.0, 10_000.0)]
    assert needed(burst, 100.0).stock == 10_000.0
    shuffled = random.Random(0).sample(even, len(even))
    assert needed(shuffled, 100.0) == needed(even, 100.0)


def test_the_command_writes_a_row_for_each_number_and_a_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(replicas.SHAPES, "SmolLM2", SMALL)
    out = tmp_path / "replicas.json"
    command = ["replicas", "--groups", "1", "2", "--rate", "0.02", "--hours", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert replicas.main() == 0
    found = json.loads(out.read_text())
    assert [row["groups"] for row in found["rows"]] == [1, 2, "scaled"] and len(found["held"]) == 3
    one, two, _ = found["rows"]
    assert one["mean_groups"] == 1 and two["mean_groups"] == pytest.approx(2) and two["refused"] <= one["refused"]
    assert sum(found["arrivals"]["counts"]) > 10 and out.with_suffix(".png").stat().st_size > 10_000
    assert capsys.readouterr().out.startswith("groups")
    monkeypatch.setattr(sys, "argv", ["replicas", "--rate", "0"])
    assert replicas.main() == UsageError.exit_code
    assert "above 0" in capsys.readouterr().err


def test_the_pages_table_is_of_the_results():
    page = (DEPLOY.parent / "docs" / "deploying.md").read_text("utf-8")
    rows = json.loads(replicas.RESULTS.read_text("utf-8"))["rows"]
    assert [row["groups"] for row in rows] == [*replicas.GROUPS, "scaled"] and not any(row["late"] for row in rows)
    for row in rows:
        first = f"{row['first_token_p50']:.1f}, {row['first_token_p99']:.0f} s"
        token = f"{row['token_p50']:.2f}, {row['token_p99']:.1f} s"
        cost = f"{100 * row['busy']:.0f} % | {row['machine_seconds_a_token']:.1f} | {row['dealers']}, "
        assert f"| {100 * row['refused']:.0f} % | {first} | {token} | {cost}" in page
