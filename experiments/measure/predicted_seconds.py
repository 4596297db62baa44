"""How far the seconds that ``cost`` predicts are from what a run takes on this machine, and constants that fit it.

    python -m experiments.measure.predicted_seconds --json runs/predicted_seconds.json

Runs of engine ``wire`` with a tape, the parties on this machine: decode steps of ``bench`` at several sizes, and
requests of the shipped model, prefill and steps apart. Each is held against ``commands.machine.Machine``, whose three
constants are then fitted anew to all of them: least squares of relative errors, no constant below zero. What to put
there is printed last. Parties should have a core each; other work on the machine counts as theirs.

With ``--json`` a run's seconds are kept when it is done, and a command that is started again goes on from there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from crypten_llm.commands.cost import count_bench, predict
from crypten_llm.commands.deal import deal
from crypten_llm.commands.machine import Machine
from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan
from crypten_llm.session.report import Cost
from crypten_llm.session.settings import split
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import print_table

SHAPES = {
    "a layer, d = 256, after 1,024": Shape(hidden=256, heads=8, kv_heads=8, ffn=688, kv_len=1024),
    "four layers, d = 64, after 128": Shape(hidden=64, heads=4, kv_heads=4, ffn=172, layers=4, kv_len=128),
    "two layers, d = 1,024, after 512": Shape(hidden=1024, heads=16, kv_heads=4, ffn=2816, layers=2, kv_len=512),
    "a layer, d = 2,048, after 1,024": Shape(hidden=2048, heads=32, kv_heads=32, ffn=5632, kv_len=1024),
    "a token of SmolLM2's sizes, after 256": Shape(
        hidden=576, heads=9, kv_heads=3, ffn=1536, layers=30, kv_len=256, vocab=49152
    ),
}
PROMPTS = (64, 256, 512)  # tokens, of the shipped model
NEW_TOKENS = 8
CONSTANTS = ("round", "product", "material")  # of ``Machine``, of a party
NOTHING = Machine(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Point:
    """One measured figure, beside what ``cost`` counts for it."""

    name: str
    seconds: float
    counts: tuple[float, ...]  # by constant

    def predicted(self, machine: Machine) -> float:
        return sum(count * getattr(machine, name) for count, name in zip(self.counts, CONSTANTS, strict=True))


def counts_of(cost_with, phases: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """By phase, how often each constant is in its seconds. cost_with: the predicted cost on a machine."""
    found: dict[str, list[float]] = {phase: [] for phase in phases}
    for name in CONSTANTS:
        cost: Cost = cost_with(replace(NOTHING, **{name: 1.0}))
        for phase in phases:
            found[phase].append(sum(row["seconds"] for row in cost.table() if row["phase"] == phase))
    return {phase: tuple(counts) for phase, counts in found.items()}


def fit(points: Sequence[Point]) -> Machine:
    """The constants that make the sum of squared relative errors least, none below zero: the best of the fits of some
    constants alone, the others being zero, that has none below.
    """
    rows = torch.tensor([[count / point.seconds for count in point.counts] for point in points], dtype=torch.float64)
    ones = torch.ones(len(points), 1, dtype=torch.float64)
    best, least = NOTHING, float(len(points))
    for size in range(1, len(CONSTANTS) + 1):
        for some in itertools.combinations(range(len(CONSTANTS)), size):
            found = torch.linalg.lstsq(rows[:, some], ones).solution
            error = ((rows[:, some] @ found - ones) ** 2).sum().item()
            if error < least and (found > 0).all():
                values = dict(zip((CONSTANTS[i] for i in some), found.flatten().tolist(), strict=True))
                best, least = replace(NOTHING, **values), error
    return best


def measured_bench(shape: Shape, folder: str) -> dict[str, float]:
    deal(shape, folder, say=lambda line: None)
    with PrivateLlama(*split({"engine": "wire", "tape": folder})) as llama:
        return {"decode": llama.bench(shape)[0]["seconds_per_step"]}


def measured_request(plan: Plan, folder: str) -> dict[str, float]:
    deal(plan, folder, LlamaConfig.from_folder(SHIPPED), say=lambda line: None)
    ids = [3 + i % 200 for i in range(plan.prompt_tokens)]
    with PrivateLlama.from_pretrained("shipped", engine="wire", tape=folder) as llama:
        result = llama.generate(input_ids=ids, max_new_tokens=plan.max_new_tokens, hide_length=True)
    table = result.cost.table()
    return {phase: sum(row["seconds"] for row in table if row["phase"] == phase) for phase in ("prefill", "decode")}


def works() -> dict[str, Shape | Plan]:
    return SHAPES | {
        f"shipped model, {length} tokens": Plan(length, NEW_TOKENS, hide_length=True) for length in PROMPTS
    }


def counted(work: Shape | Plan) -> dict[str, tuple[float, ...]]:
    """``counts_of`` the work, of one decode step of a shape."""
    if isinstance(work, Shape):
        found = counts_of(lambda machine: count_bench(work, machine), ("decode",))
        return {"decode": tuple(count / work.steps for count in found["decode"])}
    config = LlamaConfig.from_folder(SHIPPED)
    return counts_of(lambda machine: predict(config, work, machine=machine).cost, ("prefill", "decode"))


def points_of(runs: dict[str, list[dict[str, float]]]) -> list[Point]:
    """What was measured, the median of repeats."""
    points = []
    for name, work in works().items():
        for phase, counts in counted(work).items() if name in runs else ():
            label = name if isinstance(work, Shape) else f"{name}: {phase}"
            points.append(Point(label, median(run[phase] for run in runs[name]), counts))
    return points


def shown(points: Sequence[Point], fitted: Machine) -> list[dict]:
    """The rows of the table: predicted over measured, by ``cost``'s constants and by those that are fitted here."""
    return [
        {
            "run": point.name,
            "seconds": f"{point.seconds:.4f}",
            "predicted / measured": f"{point.predicted(Machine()) / point.seconds:.2f}",
            "fitted": f"{point.predicted(fitted) / point.seconds:.2f}",
        }
        for point in points
    ]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each run, one after another (3)")
    parser.add_argument("--runs", nargs="+", default=list(works()), choices=list(works()), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="F", help="keep the seconds")
    arguments = parser.parse_args()
    result = kept.load(arguments.json)
    runs = result.setdefault("runs", {})
    todo = [name for n in range(arguments.repeats) for name in arguments.runs if len(runs.get(name, [])) <= n]
    with tqdm(todo, unit="run", disable=not sys.stderr.isatty()) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            work = works()[name]
            with tempfile.TemporaryDirectory(prefix="seconds-") as folder:
                tape = str(Path(folder) / "tape")
                found = measured_bench(work, tape) if isinstance(work, Shape) else measured_request(work, tape)
            runs.setdefault(name, []).append(found)
            sign(result, "crypten")
            kept.save(arguments.json, result)
    points = points_of(runs)
    fitted = fit(points)
    print_table(shown(points, fitted))
    print("Machine(" + ", ".join(f"{name}={getattr(fitted, name):.3g}" for name in CONSTANTS) + ")")


if __name__ == "__main__":
    sys.exit(main())
