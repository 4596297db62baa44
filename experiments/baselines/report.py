"""The tables of ``compare_baselines``, as one Markdown file. Owns how figures are written, not what they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from crypten_llm.units import size
from eviction import FULL, POLICIES
from experiments.baselines.cells import seconds
from experiments.baselines.policies import PARTS
from experiments.baselines.summary import Result, Summary
from experiments.tools.intervals import Interval
from experiments.tools.tables import markdown_table

NONE = "–"


def table(heads: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    return markdown_table(heads, rows, missing=NONE)


def share(value: float | None, digits: int = 1) -> str | None:
    return None if value is None else f"{100 * value:.{digits}f}"


def interval(found: Interval | None, sign: str = "") -> str | None:
    """In percent."""
    if found is None:
        return None
    return f"{100 * found.mean:{sign}.1f} [{100 * found.low:{sign}.1f}, {100 * found.high:{sign}.1f}]"


def budget(result: Result) -> str | None:
    return None if result.entry.budget is None else f"{100 * result.entry.budget:g} %"


def perplexity(found: Interval | None) -> str | None:
    if found is None:
        return None
    return f"{math.exp(found.mean):.2f} [{math.exp(found.low):.2f}, {math.exp(found.high):.2f}]"


def costs(result: Result, engine: str = "wire") -> list:
    """Online and dealer bytes, rounds, seconds LAN and WAN."""
    found = result.cost.get(engine)
    if found is None:
        return [None] * 5
    return [
        size(found["online_bytes"]),
        size(found["dealer_bytes"]),
        f"{found['rounds']:.1f}".removesuffix(".0"),
        f"{seconds(found, 'lan'):.3f}",
        f"{seconds(found, 'wan'):.2f}",
    ]


COSTS = ("online", "dealer", "rounds", "LAN, s", "WAN, s")


def _main_rows(results: list[Result]) -> list[str]:
    heads = ("policy", "budget", "kept, %", "read, %", "accuracy, %", "against `full`", *COSTS)
    return table(
        heads,
        (
            (
                *(_name(result), budget(result), share(result.kept), share(result.attended)),
                *(interval(result.mean), interval(result.difference, "+"), *costs(result)),
            )
            for result in results
        ),
    )


def _task_rows(results: list[Result]) -> list[str]:
    tasks = list(dict.fromkeys(task for result in results for task in result.tasks))
    texts = list(dict.fromkeys(task for result in results for task in result.losses))
    return table(
        ("policy", "budget", *tasks, *(f"{task}, perplexity" for task in texts)),
        (
            (
                *(_name(result), budget(result)),
                *(interval(result.tasks.get(task)) for task in tasks),
                *(perplexity(result.losses.get(task)) for task in texts),
            )
            for result in results
        ),
    )


def _name(result: Result) -> str:
    return f"`{result.entry.name}`"


def _matrix(summary: Summary) -> list[str]:
    """Policies by budgets: the mean over tasks and lengths, and the difference to ``full``."""
    budgets, by_name = summary.config.budgets, {}
    for result in summary.over_lengths:
        by_name.setdefault(result.entry.name, {})[result.entry.budget] = result
    lines = []
    for name, found in by_name.items():
        cells = [found.get(budget, found.get(None)) for budget in budgets]
        lines.append((f"`{name}`", *(f"{interval(cell.mean) or NONE} ({_signed(cell.difference)})" for cell in cells)))
    return table(("policy", *(f"{100 * budget:g} %" for budget in budgets)), lines)


def _differences(summary: Summary, name: str) -> list[str]:
    """A policy beside each other one, by budget, on the same prompts; nothing where there is nothing to compare."""
    budgets, others = summary.config.budgets, [other for other in summary.config.policies if other != name]
    found = {other: [summary.beside(name, other, budget) for budget in budgets] for other in others}
    rows = [(f"`{other}`", *(interval(cell, "+") for cell in cells)) for other, cells in found.items() if any(cells)]
    if not rows:
        return []
    return [
        *(f"## `{name}` beside each other policy", ""),
        "The mean over tasks and lengths less that of the other policy at the same budget, on the same prompts.",
        *("", *table(("policy", *(f"{100 * budget:g} %" for budget in budgets)), rows), ""),
    ]


def _signed(found: Interval | None) -> str:
    return NONE if found is None else f"{100 * found.mean:+.1f}"


def _crypten_rows(results: list[Result]) -> list[str]:
    full = {result.length: result.cost for result in results if result.entry.name == FULL.name}
    lines = []
    for result in results:
        mine = result.cost.get("crypten")
        if mine:
            base = full.get(result.length, {}).get("crypten")
            ratio = f"{base['online_bytes'] / mine['online_bytes']:.2f}" if base else None
            lines.append((f"{result.length:,}", _name(result), budget(result), *costs(result, "crypten"), ratio))
    return table(("tokens", "policy", "budget", *COSTS, "times fewer online"), lines)


def _private_rows(rows: list[dict], results: list[Result]) -> list[str]:
    names = {(result.length, result.entry.text): _name(result) for result in results}
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["length"], row["policy"]), []).append(row)
    lines = []
    for (length, policy), part in found.items():
        margins = sorted(margin for row in part for margin in row["margins_lost"])
        lines.append(
            (
                *(names.get((length, policy), f"`{policy}`"), f"{length:,}", len(part)),
                f"{sum(row['equal'] for row in part)} of {len(part)}",
                f"{sum(row['agree'] for row in part)} of {sum(row['tokens'] for row in part)}",
                f"{max(row['logit_error'] for row in part):.4f}",
                ", ".join(f"{margin:.2g}" for margin in margins) or "none",
            )
        )
    heads = ("policy", "tokens", "prompts", "answers equal", "tokens equal", "largest logit error", "margins lost")
    return table(heads, lines)


def _ablation(summary: Summary, policy: str, parts: Iterable[str]) -> list[str]:
    """The policy and its rows of the ablation, by length and budget; nothing where none of these was asked for."""
    budgets = summary.config.ablation.budgets
    whole = [result for result in summary.policies if result.entry.name == policy and result.entry.budget in budgets]
    changed = [result for result in summary.ablation if result.entry.name in parts]
    lines = [f"## Ablation: `{policy}` with one of its parts changed", ""]
    for length in summary.config.ablation.lengths:
        found = [result for result in whole + changed if result.length == length]
        found.sort(key=lambda result: budgets.index(result.entry.budget))
        lines += [f"{length:,} tokens:", "", *_main_rows(found), "", *_task_rows(found), ""]
    return lines if changed else []


def _budgets_that_mean_something_else() -> str:
    return ", ".join(f"`{kind.name}` {kind.budget_means}" for kind in POLICIES.values() if kind.budget_means)


def _setting_rows(results: list[Result]) -> list[str]:
    return table(
        ("tokens", "policy", "budget", "settings"),
        ((f"{r.length:,}", _name(r), budget(r), f"`{r.entry.text}`") for r in results if r.entry.budget is not None),
    )


def origin(runs: list[dict]) -> str:
    """Revisions, machines and versions of the runs that made a file."""
    if not runs:
        return "Nothing is measured yet."
    revisions, machines = ({run[what] or "unknown" for run in runs} for what in ("revision", "machine"))
    versions = ", ".join(f"{name} {number}" for name, number in runs[-1]["versions"].items())
    return f"Revision {', '.join(sorted(revisions))}; {'; '.join(sorted(machines))}; {versions}."


def markdown(summary: Summary, runs: list[dict], command: str, pictures: Sequence[str] = ()) -> str:
    config = summary.config
    tasks = [task for task in config.tasks if not any(task in result.losses for result in summary.policies)]
    per_length = {
        length: [result for result in summary.policies if result.length == length] for length in config.lengths
    }
    above = "" if config.long_samples == config.samples else f" ({config.long_samples} above 1,024 tokens)"
    lines = [
        *("# Eviction policies: accuracy against secure cost", ""),
        *(f"Made by `{command}`; model `{config.model}`, seed {config.seed}. {origin(runs)}", ""),
        f"Accuracy: the mean over {', '.join(tasks)}, greedy answers on engine `plain`, {config.samples} held-out "
        f"prompts of each task and length{above}. In brackets 95 % intervals: of a "
        "task by Wilson, of a mean and of the difference to `full` on the same prompts by a bootstrap over prompts. "
        "*kept*: rows in the cache, *read*: rows that a step attends to, both measured, in percent of those that the "
        "full cache has at that step. Cost: of the layers of one token on engine `wire` (embedding and logits, the "
        "same for all, left out), on all links; seconds are predicted for parties with a core each. A budget is the "
        f"share of the prompt's rows that a step reads; {_budgets_that_mean_something_else()}.",
        "",
    ]
    for picture in pictures:
        lines += [f"![{picture}]({picture})", ""]
    lines += ["## Mean over tasks and lengths", "", "In round brackets: against `full`.", "", *_matrix(summary), ""]
    for policy in PARTS:
        lines += _differences(summary, policy) if policy in config.policies else []
    for length, results in per_length.items():
        lines += [f"## {length:,} tokens", "", *_main_rows(results), ""]
    if summary.ablation:
        for policy, parts in PARTS.items():
            lines += _ablation(summary, policy, parts)
    crypten = _crypten_rows(summary.policies)
    if len(crypten) > 2:
        lines += [
            *("## The same settings on engine `crypten`", ""),
            "One decode step run by its parties; rounds and bytes are exact, seconds are measured on this machine and "
            "the network's part is added.",
            *("", *crypten, ""),
        ]
    if summary.private:
        lines += [
            *("## Answered privately", ""),
            "The same prompts on engines `wire` and `plain`, token by token. *margins lost*: by how much the best "
            "logit of `plain` led where the tokens differ first.",
            *("", *_private_rows(summary.private, summary.policies), ""),
        ]
    for length, results in per_length.items():
        lines += [f"## Tasks, {length:,} tokens", "", *_task_rows(results), ""]
    lines += ["## Settings", "", *_setting_rows(summary.policies + summary.ablation)]
    return "\n".join(lines) + "\n"
