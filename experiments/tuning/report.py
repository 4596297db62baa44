"""What a search found, as JSON, Markdown and a picture.

Owns the shape of the result and how it is shown; figures come from the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from experiments.measure.eviction_cost import markdown
from experiments.tools.intervals import bootstrap, front, of_task
from experiments.tuning.goal import COSTS, Ceiling, Goal
from experiments.tuning.measure import FULL, Prompt
from experiments.tuning.search import Outcome, Search

TICKS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)  # of a share of bytes
STOPPED, RULED_OUT = "stopped early", "ruled out by its cost"


def result(search: Search, finalists: int) -> dict:
    """The best policy, the policies of the front and all others; the finalists are tried on fresh prompts first.

    The best is, of so many that lead on the search's prompts, the one that leads on fresh ones. Without fresh prompts
    it is the leader.
    """
    fresh = search.prompts.fresh
    leaders = [tried.policy for tried in search.ranked()[:finalists]]
    shown = list(dict.fromkeys([FULL, search.space.untuned, *leaders]))
    prompts = fresh or search.prompts.searched
    search.bench.scores(prompts, shown)
    again = {policy: search.on(policy, prompts) for policy in shown}
    met = [again[policy] for policy in leaders if search.goal.is_met(again[policy], again[FULL].accuracy)]
    outcomes = search.outcomes()
    return {
        "goal": str(search.goal),
        "untuned": search.space.untuned,
        "best": min(met, key=search.goal.order).policy if met else None,
        "leaders": leaders,
        "shown": [_figures(search, policy, prompts) for policy in shown],
        "tokens_counted": search.bench.tokens,
        "prompts": {"searched": len(search.prompts.searched), "fresh": len(fresh)},
        "front": _front(search.goal, outcomes),
        "saving": _saving(search, outcomes),
        "policies": [_row(outcome) for outcome in outcomes],
    }


def _figures(search: Search, policy: str, prompts: Sequence[Prompt]) -> dict:
    """difference: to the full cache on the same prompts."""
    tasks = [[p.name for p in prompts if p.example.task == task] for task in {p.example.task: None for p in prompts}]
    scores, full_scores = ([search.bench.store.scores(one, names) for names in tasks] for one in (policy, FULL))
    counts, full = (search.bench.counts(one) for one in (policy, FULL))
    return {
        "policy": policy,
        "accuracy": asdict(of_task([score for task in scores for score in task])),
        "difference": asdict(bootstrap(scores, full_scores)),
        "times_fewer": (full["online"] + full["dealer"]) / (counts["online"] + counts["dealer"]),
        **counts,
    }


def _row(outcome: Outcome) -> dict:
    how = "all prompts" if outcome.finished else STOPPED if outcome.prompts else RULED_OUT
    return {
        "policy": outcome.policy,
        "how": how,
        "prompts": outcome.prompts,
        "accuracy": outcome.accuracy,
        **outcome.cost,
    }


def _front(goal: Goal, outcomes: list[Outcome]) -> list[str]:
    finished = [outcome for outcome in outcomes if outcome.finished]
    return [finished[i].policy for i in front([(outcome.cost[goal.what], outcome.accuracy) for outcome in finished])]


def _saving(search: Search, outcomes: list[Outcome]) -> dict:
    every = search.space.points
    policies = search.space.size if every is None else len(every)
    return {
        "pairs": sum(outcome.prompts for outcome in outcomes),
        "policies_tried": sum(outcome.prompts > 0 for outcome in outcomes),
        "policies_on_all_prompts": sum(outcome.finished for outcome in outcomes),
        "ruled_out_by_cost": sum(not outcome.prompts for outcome in outcomes),
        "grid_policies": policies,
        "grid_is_exact": every is not None,
        "grid_pairs": policies * len(search.prompts.searched),
    }


def text(found: dict) -> str:
    """The Markdown page of a result."""
    saving, prompts, shown = found["saving"], found["prompts"], found["shown"]
    kind, which = ("fresh", "prompts that the search has not seen") if prompts["fresh"] else ("searched", "prompts")
    best = f"Best: `{found['best']}`" if found["best"] else _nothing(found)
    at_most = "" if saving["grid_is_exact"] else " at most, those that come to the same among them"
    times = saving["grid_pairs"] / max(1, saving["pairs"])
    lines = [
        f"# {found['title']}",
        "",
        best,
        "",
        f"Accuracy on {prompts[kind]} {which}, and its difference to the full cache's on the same ones, with intervals "
        f"of 95 %. Costs are those of one token's attention after {found['tokens_counted']:,}, "
        "counted; seconds are predicted, for all layers.",
        "",
        markdown({"The leaders, the full cache and the default": [_shown(row, found) for row in shown]}),
        markdown({"Accuracy against cost: the policies that no other one beats at both": _front_rows(found)}),
        "## What the search took",
        "",
        f"{saving['policies_tried']} policies met a prompt, {saving['policies_on_all_prompts']} of them all "
        f"{prompts['searched']}; {saving['ruled_out_by_cost']} more were ruled out by their cost alone. That is "
        f"{saving['pairs']:,} (prompt, policy) pairs; the full grid of the same values has {saving['grid_policies']:,} "
        f"policies{at_most}, and so {saving['grid_pairs']:,} pairs: {times:,.1f} times as many.",
        "",
    ]
    return "\n".join(lines)


def _nothing(found: dict) -> str:
    if found["leaders"]:
        return f"No leader meets the goal ({found['goal']}) on fresh prompts: give more --samples, or ask for less."
    return f"No policy of the search meets the goal ({found['goal']}): ask for less, or go on with more --policies."


def _shown(row: dict, found: dict) -> dict:
    default, best = (row["policy"] == found[name] for name in ("untuned", "best"))
    return {
        "policy": f"`{row['policy']}`" + " (default)" * default + " **best**" * best,
        "accuracy": "{mean:.1%} ({low:.1%} to {high:.1%})".format_map(row["accuracy"]),
        "less_full's": "{mean:+.1%} ({low:+.1%} to {high:+.1%})".format_map(row["difference"]),
        "times_fewer": round(row["times_fewer"], 2),
        "online_bytes": row["online"],
        "dealer_bytes": row["dealer"],
        "rounds": round(row["rounds"], 1),
        "LAN_s": round(row["lan"], 3),
        "WAN_s": round(row["wan"], 3),
    }


def _front_rows(found: dict) -> list[dict]:
    rows = {row["policy"]: row for row in found["policies"]}
    return [
        {
            "policy": f"`{policy}`",
            "accuracy, searched": f"{rows[policy]['accuracy']:.1%}",
            "bytes, of full's": f"{rows[policy]['bytes']:.1%}",
            "LAN_s": round(rows[policy]["lan"], 3),
            "WAN_s": round(rows[policy]["wan"], 3),
        }
        for policy in found["front"]
    ]


def beside(search: dict, grid: dict) -> str:
    """A Markdown table of a search and the grid of the same space, by what each found and took."""
    rows = []
    for name, found in (("search", search), ("full grid", grid)):
        policies = {row["policy"]: row for row in found["policies"]}
        first = policies[found["leaders"][0]] if found["leaders"] else {}
        rows.append(
            {
                "": name,
                "pairs": f"{found['saving']['pairs']:,}",
                "policies": found["saving"]["policies_tried"],
                "leader": f"`{first.get('policy', 'none')}`",
                "its accuracy, searched": f"{first['accuracy']:.1%}" if first else None,
                "its bytes, of full's": f"{first['bytes']:.1%}" if first else None,
            }
        )
    return markdown({"The search beside the full grid": rows})


def draw(found: dict, goal: Goal, path: Path) -> None:
    """Accuracy against cost: all policies, the front, the goal."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    panel, what = figure.subplots(), goal.what
    rows, shown = found["policies"], {row["policy"]: row for row in found["shown"]}

    def points(chosen):
        return [row[what] for row in chosen], [row["accuracy"] for row in chosen]

    styles = {STOPPED: ("x", "#999999", 28), "all prompts": ("o", "#56B4E9", 34)}  # colours of Okabe and Ito
    for how, (marker, colour, area) in styles.items():
        if not (chosen := [row for row in rows if row["how"] == how]):
            continue
        label = f"{how} ({len(chosen)})" + (": on the prompts it met" if how == STOPPED else "")
        panel.scatter(*points(chosen), marker=marker, s=area, color=colour, label=label)
    best_known = [row for policy in found["front"] for row in rows if row["policy"] == policy]
    panel.step(*points(best_known), where="post", color="#0072B2", label="no other policy beats these")
    full = shown[FULL]
    marks = [(FULL, "full cache", "*", "black"), (found["untuned"], "default settings", "s", "#009E73")]
    marks += [(found["best"], "best", "D", "#D55E00")] if found["best"] else []
    on = ", on fresh prompts" if found["prompts"]["fresh"] else ""
    for policy, name, marker, colour in marks:
        row = shown[policy]
        x, (y, low, high) = 1 / row["times_fewer"] if what == "bytes" else row[what], row["accuracy"].values()
        spread = [[max(0.0, y - low)], [max(0.0, high - y)]]  # rounding may put an end on the wrong side
        panel.errorbar([x], [y], spread, marker=marker, markersize=8, color=colour, label=name + on, zorder=3)
    if isinstance(goal, Ceiling):
        panel.axvline(goal.limit, linestyle="--", color="#CC79A7", label="ceiling")
    else:
        panel.axhline(goal.limit * full["accuracy"]["mean"], linestyle="--", color="#CC79A7", label="floor")
    if what == "bytes":
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator(TICKS))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.set_xlabel(f"{COSTS[what]}, after {found['tokens_counted']:,} tokens")
    panel.set_ylabel("accuracy, mean over tasks")
    panel.set_title(found["title"], loc="left")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="best")
    figure.savefig(path, dpi=120)
