"""Finds the settings of an eviction policy for a model: as accurate as can be under a ceiling of cost, or as cheap as
can be above a floor of accuracy.

    python experiments/tune.py --max-bytes 0.25                        a quarter of full's attention bytes
    python experiments/tune.py --min-accuracy 0.99                     cheapest in bytes, 99 % of full's accuracy
    python experiments/tune.py --max-seconds 3.2 --network wan --policy quest
    python experiments/tune.py --max-bytes 0.25 --search static=0.3,0.5 second summary --set share=false
    python experiments/tune.py --max-bytes 0.25 --grid                 every combination: what the search saves

Accuracy is measured on engine ``plain`` (``experiments.measure.quality``), cost is counted on engine ``wire``
(``experiments.measure.eviction_counts``), both of the same policy. A search goes over a few values of each setting; its
folder keeps all that was measured and the study, so a run that was killed at any moment goes on with the same command,
and another goal for the same model begins with the scores that are there. After a change of a policy's code give
another folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

if not __package__:  # run as a file, which puts this folder where the project's should be
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from crypten_llm.errors import UsageError
from experiments.tools.command import command
from experiments.tools.provenance import provenance
from experiments.tuning.goal import Ceiling, Floor, Goal
from experiments.tuning.measure import Bench, draw_prompts
from experiments.tuning.report import beside, draw, result, text
from experiments.tuning.search import Search
from experiments.tuning.space import space
from experiments.tuning.store import Measured
from experiments.tuning.study import locked

TASKS = ("passkey", "key_value", "one_hop", "two_hop", "few_shot", "span_copy", "variables")


def goal(arguments: argparse.Namespace) -> Goal:
    """Raises UsageError for a limit that means nothing."""
    for name in ("max_bytes", "max_seconds", "min_accuracy"):
        limit = getattr(arguments, name)
        if limit is not None and not limit > 0:
            raise UsageError(f"--{name.replace('_', '-')} is {limit:g}; it must be above 0")
    if arguments.min_accuracy is not None:
        return Floor(arguments.cost, arguments.min_accuracy)
    if arguments.max_seconds is not None:
        return Ceiling(arguments.network, arguments.max_seconds)
    return Ceiling("bytes", arguments.max_bytes)


def tune(arguments: argparse.Namespace) -> str:
    """Searches, or goes on; writes the result's files and returns its page."""
    wanted, searched = goal(arguments), space(arguments.policy, arguments.search, arguments.set)
    if arguments.grid and searched.points is None:
        raise UsageError(f"the grid has {searched.size:,} points; name fewer settings or values with --search")
    setup = {
        "model": arguments.model,
        "space": searched.describe(),
        **{name: getattr(arguments, name) for name in ("tasks", "lengths", "samples", "seed", "batch", "confidence")},
    }
    title = f"{arguments.policy}: {wanted}"
    name = re.sub(r"[^a-z0-9.]+", "_", title.lower()).strip("_")
    out, drawn = arguments.out, ("model", "tasks", "lengths", "samples", "fresh", "seed", "data", "offline")
    with locked(out):
        store = Measured(out / "measured.jsonl", arguments.model)
        prompts = draw_prompts(**{name: getattr(arguments, name) for name in drawn})
        with Bench(store, arguments.model, max(arguments.lengths), arguments.workers, arguments.offline) as bench:
            study = f"{name}_grid" if arguments.grid else name
            how = (arguments.confidence, arguments.batch, arguments.seed, arguments.grid)
            search = Search(out, study, setup, searched, wanted, bench, prompts, *how)
            search.run(len(searched.points) if arguments.grid else arguments.policies)
            found = {"title": title + (" (full grid)" if arguments.grid else ""), "setup": setup}
            found |= result(search, arguments.finalists) | {"provenance": provenance("optuna")}
    path = out / study
    _write(path, ".json", json.dumps(found, indent=1) + "\n")
    page = text(found)
    if (both := _both(out, name, setup)) is not None:
        page += "\n" + beside(*both)
    _write(path, ".md", page)
    draw(found, wanted, Path(f"{path}.png"))
    return page


def _write(path: Path, ending: str, content: str) -> None:
    Path(f"{path}{ending}").write_text(content, "utf-8")


def _both(out: Path, name: str, setup: dict) -> tuple[dict, dict] | None:
    """The results of the search and of the grid, once both are there for one setup."""
    paths = [out / f"{name}{ending}.json" for ending in ("", "_grid")]
    if not all(path.exists() for path in paths):
        return None
    search, grid = (json.loads(path.read_text("utf-8")) for path in paths)
    return (search, grid) if search["setup"] == grid["setup"] else None


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument(
        "--max-bytes", type=float, metavar="SHARE", help="attention's bytes, online and dealer, of full's"
    )
    limit.add_argument("--max-seconds", type=float, metavar="S", help="predicted seconds of a token's layers")
    limit.add_argument("--min-accuracy", type=float, metavar="SHARE", help="of full's accuracy")
    parser.add_argument("--network", default="lan", choices=["lan", "wan"], help="of --max-seconds (default: lan)")
    parser.add_argument(
        "--cost", default="bytes", choices=["bytes", "lan", "wan"], help="least above --min-accuracy (default: bytes)"
    )
    parser.add_argument("--policy", default="mpcache", help="what to tune (default: mpcache)")
    parser.add_argument(
        "--search", nargs="+", default=[], metavar="NAME[=V,V]", help="settings to search (default: all), and values"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=V", help="settings that keep this value")
    parser.add_argument("--model", default="shipped", help="a folder or hub id (default: shipped)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    parser.add_argument("--data", help="folder or hub id of tasks that lie in files")
    parser.add_argument("--offline", action="store_true", help="ask no hub")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[512, 1024],
        metavar="T",
        help="prompt tokens; costs: the longest",
    )
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="of each task and length (default: 16)")
    parser.add_argument("--fresh", type=int, default=32, metavar="N", help="beside them, for finalists (default: 32)")
    parser.add_argument("--finalists", type=int, default=4, metavar="N", help="tried on fresh prompts (default: 4)")
    parser.add_argument("--policies", type=int, default=48, metavar="N", help="to try on prompts (default: 48)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="policies that share a prefill (default: 8)")
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        help="that a policy falls short, to stop it (default: 0.95)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", action="store_true", help="try every combination on all prompts")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), metavar="FOLDER", help="(default: runs/tune)")
    print(tune(parser.parse_args()), end="")


if __name__ == "__main__":
    sys.exit(main())
