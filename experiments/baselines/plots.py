"""The pictures of ``compare_baselines``. Owns how they look, but for a policy's colour, marker and line, which are its
own in all of them (``Policy.style``).

Colours are Okabe and Ito's, told apart by the colour-blind; policies of one kind share one and differ in marker and
line. What has none of its own, such as a policy with its own settings, gets the next of ``OTHERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, groupby
from math import floor, log10
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from eviction import FULL
from experiments.baselines.cells import seconds
from experiments.baselines.policies import PARTS, names, style
from experiments.baselines.summary import Result, Summary
from experiments.tools.intervals import front

STYLES = {name: look for name in names() if (look := style(name))}
OTHERS = cycle([("#A0522D", "8", "-"), ("#7B3294", "1", "-"), ("#4D4D4D", "2", "-")])
SHOWN = 0.2  # the budget of pictures that show one
WIDTH = 10.0  # inches


def _style(name: str) -> dict:
    if name not in STYLES:
        STYLES[name] = next(OTHERS)
    color, marker, line = STYLES[name]
    main = name in PARTS
    return {
        **{"color": color, "marker": marker, "linestyle": line},
        **{"linewidth": 2.4 if main else 1.3, "markersize": 7 if main else 5.5, "zorder": 5 if main else 3},
    }


def _legend(figure: Figure, names: list[str]) -> None:
    handles = [Line2D([], [], label=name.replace("_", " "), **_style(name)) for name in names]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9, handlelength=3)


def _lines_of(results: list[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.entry.name, []).append(result)
    return found


def _shares_axis(axis, ticks) -> None:
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{100 * tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def _lengths_axis(axis, lengths) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("tokens of context")


def accuracy(summary: Summary) -> Figure:
    """Accuracy against the share of rows that a step reads, a panel for each length."""
    lengths = summary.config.lengths
    columns = min(2, len(lengths))
    rows = -(-len(lengths) // columns)
    figure = Figure(figsize=(WIDTH, 0.6 + 3.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axis in panels[len(lengths) :]:
        axis.set_visible(False)
    for axis, length in zip(panels, lengths, strict=False):
        for name, found in _lines_of([r for r in summary.policies if r.length == length and r.mean]).items():
            if name == FULL.name:
                axis.axhline(100 * found[0].mean.mean, color="black", linewidth=1.3)
                continue
            points = sorted((r for r in found if r.attended), key=lambda r: (r.attended, r.entry.budget or 0))
            x, y = [r.attended for r in points], [100 * r.mean.mean for r in points]
            axis.plot(x, y, **_style(name))
            if name in PARTS:
                low, high = [100 * r.mean.low for r in points], [100 * r.mean.high for r in points]
                axis.fill_between(x, low, high, color=STYLES[name][0], alpha=0.15, linewidth=0)
        axis.set_title(f"{length:,} tokens", fontsize=11)
        axis.grid(alpha=0.25)
        _shares_axis(axis, (0.05, 0.1, 0.2, 0.5, 1))
    for axis in figure.axes[-columns:]:
        axis.set_xlabel("rows read at a step, % of the full cache")
    for axis in figure.axes[::columns]:
        axis.set_ylabel("accuracy, % (mean over tasks)")
    _legend(figure, list(_lines_of(summary.policies)))
    return figure


def _shown(summary: Summary) -> tuple[float, list[Result]]:
    """The budget nearest to SHOWN, and its results, with those that have none."""
    budget = min(summary.config.budgets, key=lambda budget: abs(budget - SHOWN))
    return budget, [r for r in summary.policies if r.entry.budget in (None, budget) and "wire" in r.cost]


def cost(summary: Summary) -> Figure:
    """Online bytes, the dealer's, and rounds of a token against context length."""
    budget, results = _shown(summary)
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    parts = (("online_bytes", "MB online", 1e6), ("dealer_bytes", "MB from the dealer", 1e6), ("rounds", "rounds", 1))
    for axis, (name, title, unit) in zip(figure.subplots(1, 3), parts, strict=True):
        for policy, found in _lines_of(results).items():
            x, y = [r.length for r in found], [r.cost["wire"][name] / unit for r in found]
            axis.plot(x, y, **_style(policy))
        _lengths_axis(axis, summary.config.lengths)
        if unit > 1:
            axis.set_yscale("log")
            _log_axis(axis.yaxis)
        else:
            axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.set_title(f"{title}, a token", fontsize=11)
        axis.grid(alpha=0.25)
    figure.suptitle(f"Engine wire, policies that read {100 * budget:g} % of the rows", fontsize=11)
    _legend(figure, list(_lines_of(results)))
    return figure


def _log_axis(axis) -> None:
    """1, 2, 3 and 5 of each power of ten, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{max(0, -floor(log10(value)))}f}"))
    axis.set_minor_locator(NullLocator())


def time(summary: Summary) -> Figure:
    """Predicted seconds of a token on two networks: a row for each policy, a dot for each length."""
    budget, results = _shown(summary)
    longest = max(summary.config.lengths)
    lines = _lines_of(results)
    order = sorted(lines, key=lambda name: -seconds(_at(lines[name], longest).cost["wire"], "lan"))
    figure = Figure(figsize=(WIDTH, 1.4 + 0.3 * len(order)), layout="constrained")
    shades = {length: (i + 1) / len(summary.config.lengths) for i, length in enumerate(summary.config.lengths)}
    for axis, network in zip(figure.subplots(1, 2, sharey=True), ("lan", "wan"), strict=True):
        for place, policy in enumerate(order):
            color = "#D55E00" if policy in PARTS else "#0072B2" if policy != FULL.name else "#000000"
            x = [seconds(result.cost["wire"], network) for result in lines[policy]]
            axis.plot([min(x), max(x)], [place, place], color=color, linewidth=1, alpha=0.4)
            for result, value in zip(lines[policy], x, strict=True):
                axis.plot(value, place, "o", color=color, alpha=0.25 + 0.75 * shades[result.length], markersize=7)
            last = seconds(_at(lines[policy], longest).cost["wire"], network)
            axis.annotate(f"{last:.3g}", (max(x), place), (7, 0), textcoords="offset points", fontsize=8, va="center")
        full = seconds(_at(lines[FULL.name], longest).cost["wire"], network)
        axis.axvline(full, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlim(0, 1.15 * axis.get_xlim()[1])
        axis.set_title(f"{network.upper()}, seconds a token", fontsize=11)
        axis.grid(alpha=0.25, axis="x")
        axis.set_yticks(range(len(order)), [policy.replace("_", " ") for policy in order])
    lengths = ", ".join(f"{length:,}" for length in summary.config.lengths)
    figure.suptitle(
        f"Engine wire, policies that read {100 * budget:g} %; from light to dark {lengths} tokens (figures: the last)",
        fontsize=10,
    )
    return figure


def _at(results: list[Result], length: int) -> Result:
    return next(result for result in results if result.length == length)


def pareto(summary: Summary) -> Figure:
    """Accuracy against cost at the longest context: each policy at each budget, and what no other beats in both."""
    longest = max(summary.config.lengths)
    results = [r for r in summary.policies if r.length == longest and r.mean and "wire" in r.cost]
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    parts: tuple[tuple[str, Callable[[dict], float]], ...] = (
        ("MB a token, online and dealer", lambda found: (found["online_bytes"] + found["dealer_bytes"]) / 1e6),
        ("seconds a token, LAN", lambda found: seconds(found, "lan")),
        ("seconds a token, WAN", lambda found: seconds(found, "wan")),
    )
    for axis, (title, measure) in zip(figure.subplots(1, 3, sharey=True), parts, strict=True):
        points = [(measure(r.cost["wire"]), 100 * r.mean.mean) for r in results]
        for (x, y), result in zip(points, results, strict=True):
            style = _style(result.entry.name) | {"linestyle": "", "marker": STYLES[result.entry.name][1] or "o"}
            axis.plot(x, y, **style)
        best = front(points)
        axis.plot(*zip(*(points[i] for i in best), strict=True), color="black", linewidth=0.8, zorder=1)
        near, height = 0, -100.0
        for name, run in groupby(best, key=lambda i: results[i].entry.name):  # one label for neighbours on the line
            run = list(run)
            budgets = ", ".join(f"{100 * results[i].entry.budget:g}" for i in run if results[i].entry.budget)
            label = name.replace("_", " ") + (f" {budgets} %" if budgets else "")
            near, height = (near + 1 if points[run[0]][1] - height < 3 else 0), points[run[0]][1]
            up = 3 + 7 * near  # above the line there is nothing
            place = {"xytext": (-5, up), "textcoords": "offset points", "ha": "right"}
            axis.annotate(label, points[run[0]], **place, fontsize=7, zorder=6)
        low, high = min(x for x, _ in points), max(x for x, _ in points)
        axis.set_xscale("log")
        axis.set_xlim(low / (high / low) ** 0.75, high * 1.08)
        _log_axis(axis.xaxis)
        axis.tick_params(labelsize=8)
        axis.set_xlabel(title)
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylim(top=112)  # room for labels
    figure.axes[0].set_ylabel("accuracy, % (mean over tasks)")
    figure.suptitle(f"{longest:,} tokens; the line joins what no other policy beats in both", fontsize=11)
    _legend(figure, list(_lines_of(results)))
    return figure


PICTURES = {"accuracy": accuracy, "cost": cost, "time": time, "pareto": pareto}


def draw(summary: Summary, stem: Path) -> list[Path]:
    """Writes the pictures for which there are results, as ``stem``-NAME.png."""
    written = []
    has_scores, has_costs = any(r.mean for r in summary.policies), bool(_complete(summary))
    for name, picture in PICTURES.items():
        if (has_scores or name in ("cost", "time")) and (has_costs or name == "accuracy"):
            path = stem.with_name(f"{stem.name}-{name}.png")
            picture(summary).savefig(path, dpi=130)
            written.append(path)
    return written


def _complete(summary: Summary) -> bool:
    return all("wire" in result.cost for result in summary.policies)
