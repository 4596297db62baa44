"""The picture of a sweep over numbers of groups, and of a load that their number follows."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"


def draw(result: dict, path: Path) -> None:
    """result: as ``experiments.measure.replicas`` writes it."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    first, token, cost, hour = figure.subplots(2, 2).flat
    fixed = [row for row in result["rows"] if row["groups"] != "scaled"]
    (scaled,) = [row for row in result["rows"] if row["groups"] == "scaled"]
    at = [row["groups"] for row in fixed]
    titles = {"first_token": "seconds to the first token", "token": "seconds a token"}
    for axes, (name, title) in zip((first, token), titles.items(), strict=True):
        for part, color in (("p50", BLUE), ("p99", RED)):
            axes.plot(at, [row[f"{name}_{part}"] for row in fixed], "o-", color=color, label=part)
            axes.axhline(scaled[f"{name}_{part}"], color=color, linestyle=":", label=f"{part}, scaled")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    cost.plot(at, [100 * row["refused"] for row in fixed], "o-", color=BLUE, label="refused, %")
    cost.axhline(100 * scaled["refused"], color=BLUE, linestyle=":", label="refused, scaled")
    cost.set_ylim(0, 100)
    beside = cost.twinx()
    beside.plot(at, [row["machine_seconds_a_token"] for row in fixed], "s-", color=GREEN, label="machine s a token")
    beside.axhline(scaled["machine_seconds_a_token"], color=GREEN, linestyle=":", label="the same, scaled")
    beside.set_ylim(bottom=0)
    cost.set_title("what is refused (left), and what an answered token costs (right)")
    for axes in (first, token, cost):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(at))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("groups")
        axes.grid(alpha=0.3)
    lines = [*cost.get_lines(), *beside.get_lines()]
    cost.legend(lines, [str(line.get_label()) for line in lines], framealpha=0.9, fontsize=8, loc="upper center")
    minutes = [when / 60 for when, _, _ in result["looks"]]
    hour.step(minutes, [groups for _, groups, _ in result["looks"]], where="post", color=BLUE, label="groups, scaled")
    hour.plot(minutes, [waiting for _, _, waiting in result["looks"]], color=RED, linewidth=0.8, label="waiting")
    every = result["arrivals"]["every"]
    asked = [(i * every / 60, 60 * count / every) for i, count in enumerate(result["arrivals"]["counts"])]
    hour.step(*zip(*asked, strict=True), where="post", color=GREY, alpha=0.6, label="requests a minute")
    hour.set_title("the number of groups follows the load")
    hour.set_xlabel("minutes")
    hour.grid(alpha=0.3)
    hour.set_ylim(bottom=0)
    for axes in (first, token, hour):
        axes.legend(framealpha=0.9, fontsize=8)
    figure.savefig(path, dpi=80)
