"""What decode steps of ``bench`` took when parties ran them, and the table of it, for ``eviction_cost``."""

from __future__ import annotations

from statistics import median

from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.bench import Shape
from experiments.measure.eviction_counts import ATTENTION


def measured_step(llama: PrivateLlama, shape: Shape) -> dict:
    """Seconds, rounds and bytes of one of ``shape.steps`` decode steps that the parties run; the mean, as JSON."""
    figures, cost = llama.bench(shape)
    attention = [row for row in cost.table() if row["phase"] == "decode" and row["kind"] in ATTENTION]
    sums = {what: sum(row[what] for row in attention) for what in ("seconds", "bytes_sent", "rounds")}
    return {
        "seconds": figures["seconds_per_step"],
        "attention_seconds": sums["seconds"] / shape.steps,
        "rounds": cost.rounds() // shape.steps,
        "attention_rounds": sums["rounds"] // shape.steps,
        "attention_online_bytes": 2 * sums["bytes_sent"] // shape.steps,
        "online_bytes": sum(cost.bytes_sent()) // shape.steps,
        "dealer_bytes": cost.dealer_bytes() // shape.steps,
    }


def measured_table(runs: dict, base: str) -> list[dict]:
    """Medians by engine, length and policy; ratios to policy ``base``: median over pairs of one repeat."""
    groups: dict[tuple, dict] = {}
    for name, run in runs.items():
        groups.setdefault((run["engine"], run["tokens"], run["policy"]), {})[name.rpartition("/")[2]] = run
    rows = []
    for (engine, length, policy), found in groups.items():
        others = groups.get((engine, length, base), {})
        pairs = [(others[repeat], run) for repeat, run in found.items() if repeat in others]

        def ratio(what, pairs=pairs):
            return round(median(other[what] / run[what] for other, run in pairs), 2) if pairs else None

        first = next(iter(found.values()))
        rows.append(
            {
                "engine": engine,
                "tokens": length,
                "policy": policy,
                "ms_a_step": round(1000 * median(run["seconds"] for run in found.values()), 1),
                "times_faster": ratio("seconds"),
                "attention_times_faster": ratio("attention_seconds"),
                "repeats": len(found),
                "rounds": first["rounds"],
                "attention_rounds": first["attention_rounds"],
                "attention_online_bytes": first["attention_online_bytes"],
                "fewer_in_attention": ratio("attention_online_bytes"),
                "online_bytes": first["online_bytes"],
                "fewer_online": ratio("online_bytes"),
                "dealer_bytes": first["dealer_bytes"],
                "fewer_of_the_dealer": ratio("dealer_bytes"),
            }
        )
    return rows
