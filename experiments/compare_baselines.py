"""Eviction policies compared: a grid of policies, tasks, budgets and context lengths, accuracy beside secure cost.

    python experiments/compare_baselines.py --quick                 a small grid, to see that all works
    python experiments/compare_baselines.py                         the committed results
    python experiments/compare_baselines.py --print-config > mine.toml
    python experiments/compare_baselines.py --config mine.toml --out runs/mine
    python experiments/compare_baselines.py --config experiments/baselines/smollm2.toml --out runs/smollm2 --device cuda

Accuracy is measured on engine ``plain``, cost counted for engine ``wire`` and measured on ``crypten``, for the same
settings; some prompts are also answered on ``wire`` end to end and compared with ``plain`` token by token. What a
budget means for each policy is in ``experiments.baselines.policies``.

Results go to OUT.jsonl, one line for each cell when it is done; the tables (OUT.md) and pictures (OUT-*.png) follow
from these. A run that was killed goes on where it was, one with more policies, tasks, lengths, budgets or samples adds
what is missing; ``--only report`` writes tables and pictures of what there is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

if not __package__:  # run as a file, which puts this folder where the project's should be
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.baselines import cells
from experiments.baselines import config as configuration
from experiments.baselines.report import markdown
from experiments.baselines.summary import Summary
from experiments.measure.eviction_counts import shape_of
from experiments.tools import real_model
from experiments.tools.command import command
from experiments.tools.journal import Journal
from experiments.tools.tables import print_table

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("accuracy", "cost", "crypten", "private", "report")
RESULTS = ROOT / "experiments" / "results" / "baselines"
QUICK = ROOT / "runs" / "baselines-quick"


def report(summary: Summary, journal: Journal, out: Path, command: str) -> list[Path]:
    """Writes tables and pictures; returns their paths."""
    from experiments.baselines.plots import draw

    pictures, tables = draw(summary, out), out.with_suffix(".md")
    tables.write_text(markdown(summary, journal.runs, command, [path.name for path in pictures]), "utf-8")
    return [tables, *pictures]


def run(arguments, config: configuration.Config, out: Path) -> None:
    shape = shape_of(real_model.resolved(config.model), max(config.lengths), config.offline)
    journal = Journal(out.with_suffix(".jsonl"), config.to_dict(), configuration.CHOOSES_CELLS)
    work = {
        "accuracy": lambda: cells.measure_accuracy(config, journal, shape.heads, arguments.workers, arguments.device),
        "cost": lambda: cells.count_costs(config, journal, shape, arguments.workers),
        "crypten": lambda: cells.run_crypten(config, journal, shape, arguments.timeout),
        "private": lambda: cells.answer_privately(config, journal, shape.heads, arguments.timeout),
    }
    started = perf_counter()
    for stage, do in work.items():
        if stage in arguments.only:
            before, begun = len(journal.rows), perf_counter()
            do()
            print(f"{stage}: {len(journal.rows) - before} new cells in {perf_counter() - begun:.0f} s", flush=True)
    written = [journal.path]
    if "report" in arguments.only:
        summary = Summary(config, journal, shape.heads)
        written += report(summary, journal, out, _command(arguments))
        print_summary(summary)
    print(f"{perf_counter() - started:.0f} s; results: {', '.join(map(_shown, written))}")


def _command(arguments) -> str:
    given = ["--quick"] if arguments.quick else []
    given += ["--config", arguments.config.name] if arguments.config else []
    given += ["--seed", str(arguments.seed)] if arguments.seed is not None else []
    return " ".join(["python experiments/compare_baselines.py", *given])


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def print_summary(summary: Summary) -> None:
    """The means over tasks and lengths, as the tables begin."""
    rows = []
    for result in summary.over_lengths:
        if result.mean:
            row = {"policy": result.entry.name, "budget": result.entry.budget, "accuracy": result.mean.mean}
            if result.difference:
                low, high = result.difference.low, result.difference.high
                row |= {"against_full": result.difference.mean, "interval": f"{low:+.3f} to {high:+.3f}"}
            rows.append(row)
    if rows:
        print_table(rows)


@command
def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="settings (.toml or .json; see --print-config)")
    parser.add_argument("--print-config", action="store_true", help="print the settings as TOML and stop")
    parser.add_argument("--quick", action="store_true", help="a small grid; minutes on two cores")
    parser.add_argument("--seed", type=int, help="of the prompts, instead of the configuration's")
    parser.add_argument("--out", type=Path, help=f"results without ending (default: {_shown(RESULTS)})")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: 2)")
    parser.add_argument("--device", default="cpu", help="where accuracy is measured: cpu or cuda (default: cpu)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of the parties (default: 600)")
    arguments = parser.parse_args(given)
    if arguments.quick and arguments.config:
        parser.error("--quick is a configuration of its own; give either it or --config")
    if arguments.workers < 1:
        parser.error(f"--workers is {arguments.workers}; it must be 1 or more")
    config = configuration.QUICK if arguments.quick else configuration.Config()
    if arguments.config:
        config = configuration.load(arguments.config)
    if arguments.seed is not None:
        config = configuration.from_dict(config.to_dict() | {"seed": arguments.seed})
    if arguments.print_config:
        print(configuration.as_toml(config), end="")
        return
    run(arguments, config, arguments.out or (QUICK if arguments.quick else RESULTS))


if __name__ == "__main__":
    sys.exit(main())
