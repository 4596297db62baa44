"""How far the seconds that ``cost --device cuda`` predicts are from what a GPU takes, and constants that fit.

    python -m experiments.measure.card_seconds --json runs/card_seconds.json --save
    python -m experiments.measure.card_seconds --json runs/card_seconds.json --runs checked

Needs a GPU. Where parties share one (``--device cuda``; ``cuda:0,cuda:1,cuda:0`` gives the client one of its own),
``nvidia-cuda-mps-control -d`` comes before. Runs of engine ``wire`` with a live dealer, over sockets and from card to
card: decode steps of ``bench``, and requests of the shipped model, each twice, of which the second counts: the first
compiles kernels. Of a request these are measured: the prefill, a token of an answer that is asked for as a whole, and
how much longer a streamed one takes, for which the dealer waits. Each is the median of the tokens behind the fourth.

The constants of a card (``commands.machine``) are three sets for each kind of links, fitted as ``predicted_seconds``
does: of prefills, of captured steps, and of the dealer. Runs that are ``checked`` are fitted to
none, unless ``--fit-all`` says so. All runs are shown beside the constants that are known and those fitted here;
``--save`` keeps these with the program. A checked run beyond a quarter of what was measured ends the command with an
error. ``--runs whole`` is a token of Llama-2-7B's sizes, for which all of a model has to fit the cards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from crypten_llm.commands import machine
from crypten_llm.commands.cost import count_bench, predict
from crypten_llm.commands.machine import CAPTURED, DEALER, PEER_MEMORY, PREFILL, SOCKETS, Machine
from crypten_llm.commands.options import PADDED_ON_A_GPU
from crypten_llm.errors import CryptenLLMError
from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan
from crypten_llm.session.settings import split
from experiments.measure.predicted_seconds import CONSTANTS, NOTHING, Point, fit
from experiments.measure.token_seconds import SETTLED, asked
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import card, sign
from experiments.tools.tables import print_table

SHAPES = {
    "two layers of Llama-2-7B's sizes, after 2,048": Shape(4096, 32, 32, 11008, layers=2, kv_len=2048, steps=6),
    "four layers, d = 1,024, after 512": Shape(1024, 16, 4, 2816, layers=4, kv_len=512, steps=8),
    "a token of SmolLM2's sizes, after 512": Shape(576, 9, 3, 1536, layers=30, kv_len=512, steps=8, vocab=49152),
}
CHECKED = {
    "two layers of Llama-3-8B's sizes, after 1,024": Shape(4096, 32, 8, 14336, layers=2, kv_len=1024, steps=6),
    "a token of 12 layers, d = 768, after 256": Shape(768, 12, 12, 2048, layers=12, kv_len=256, steps=8, vocab=32000),
}
LLAMA = Shape(4096, 32, 32, 11008, layers=32, kv_len=2048, steps=6, vocab=32000)
WHOLE = {"a token of Llama-2-7B's sizes, after 2,048": LLAMA}
PROMPTS, CHECKED_PROMPTS = (64, 256, 1024), (512,)  # tokens, of the shipped model
NEW_TOKENS = 14
LINKS = SOCKETS, PEER_MEMORY
SETS = {"prefill": PREFILL, "decode": CAPTURED, "dealer": DEALER}  # of constants, by what is measured
MANY_ROWS = 1 / 9e12  # seconds of a multiplication in products of 512 rows (``cuda_kernels``)
WITHIN = 0.25
Run = dict[str, float]  # seconds, by what was measured
Points = dict[tuple[str, str], list[Point]]  # by links and set of constants
Machines = dict[tuple[str, str], Machine]


def plan_of(length: int) -> Plan:
    return Plan(length, NEW_TOKENS, chunk=length, hide_length=True, padded=PADDED_ON_A_GPU)


def measured(device: str, links: str, works: dict[str, Shape | Plan]) -> Iterator[tuple[str, Run]]:
    """Seconds of decode steps of shapes, in one session, and of requests, in another."""
    settings = {"engine": "wire", "device": device, "peer_memory": links == PEER_MEMORY}
    shapes = {name: work for name, work in works.items() if isinstance(work, Shape)}
    plans = {name: work for name, work in works.items() if isinstance(work, Plan)}
    if shapes:
        with PrivateLlama(*split(settings)) as llama:
            for name, shape in shapes.items():
                yield name, {"decode": llama.bench(shape)[0]["seconds_per_step"]}
    if plans:
        with PrivateLlama.from_pretrained("shipped", **settings) as llama:
            for name, plan in plans.items():
                yield name, of_request(llama, plan.prompt_tokens)


def of_request(llama: PrivateLlama, length: int) -> Run:
    ids = [3 + i % 200 for i in range(length)]
    given = {"prefill_chunk": length, "padded": PADDED_ON_A_GPU}
    seconds = {}
    for hidden in (True, False, True, False):
        seconds[hidden] = asked(llama, ids, NEW_TOKENS, hide_length=hidden, **given)[1]
    whole, streamed = (median(seconds[hidden][SETTLED:]) for hidden in (True, False))
    return {"prefill": seconds[True][0], "decode": whole, "dealer": max(streamed - whole, 0.0)}


def counted(work: Shape | Plan) -> dict[str, tuple[float, ...]]:
    """How often each constant is in the seconds of a prefill, of a step and of the dealer's part of a step."""
    found: dict[str, list[float]] = defaultdict(list)
    for constant in CONSTANTS:
        one = replace(NOTHING, **{constant: 1.0}, deal=float(constant == "material"))
        if isinstance(work, Shape):
            table = count_bench(replace(work, steps=1), one).table()
            found["decode"].append(sum(row["seconds"] for row in table if row["phase"] == "decode"))
            continue
        prediction = predict(LlamaConfig.from_folder(SHIPPED), work, machine=one)
        step = prediction.phase("decode", prediction.decode_steps)
        found["prefill"].append(prediction.phase("prefill")["seconds"])
        found["decode"].append(step["seconds"])
        found["dealer"].append(step["dealer_seconds"])
    return {what: tuple(counts) for what, counts in found.items()}


def works(which: str) -> dict[str, Shape | Plan]:
    if which == "whole":
        return dict(WHOLE)
    shapes, prompts = (CHECKED, CHECKED_PROMPTS) if which == "checked" else (SHAPES, PROMPTS)
    return shapes | {f"shipped model, {length} tokens": plan_of(length) for length in prompts}


def points_of(runs: dict[str, dict[str, Run]], *which: str) -> Points:
    """What was measured of these runs, by links and by the set of constants of each."""
    points: Points = defaultdict(list)
    for name, work in itertools.chain.from_iterable(works(each).items() for each in which):
        there = {links: runs[links][name] for links in LINKS if name in runs.get(links, {})}
        counts = counted(work) if there else {}
        for links, run in there.items():
            for what, seconds in run.items():
                if seconds > 0:  # a dealer that was never waited for says nothing
                    points[links, SETS[what]].append(Point(name, seconds, counts[what]))
    return points


def constants_of(points: Points) -> Machines:
    """Fits each set to its runs. Products of prefills take what the kernels need of many rows, and the dealer's what
    parties' take in a step: by one model's runs they are not told from bytes, and would be taken for anything.
    """
    found: Machines = {}
    for (links, of), measured in sorted(points.items()):  # steps come before the dealer's part of them
        if of == CAPTURED:
            found[links, of] = fit(measured)
        else:
            product = MANY_ROWS if of == PREFILL else found[links, CAPTURED].product
            found[links, of] = replace(fit([without(each, product) for each in measured]), product=product)
    return found


def without(point: Point, product: float) -> Point:
    """The same less its products, of so many seconds each."""
    rounds, products, material = point.counts
    return Point(point.name, max(point.seconds - product * products, 1e-9), (rounds, 0.0, material))


def shown(points: Points, known: Machines, fitted: Machines) -> list[dict]:
    """The rows of the table: predicted over measured, by the constants that are known and by those fitted here."""
    rows = []
    for which, found in points.items():
        for point in found:
            row = {"links": which[0], "of": which[1], "run": point.name, "seconds": f"{point.seconds:.4f}"}
            for label, machines in (("predicted / measured", known), ("fitted", fitted)):
                row[label] = f"{point.predicted(machines[which]) / point.seconds:.2f}" if which in machines else ""
            rows.append(row)
    return rows


def known_sets(name: str) -> Machines:
    """The constants of that card that the program has; none where it has none."""
    cards = machine.known() if machine.CARDS.exists() else {}
    by_links = cards[name].constants if name in cards else {}
    return {(links, of): each.machine() for links, sets in by_links.items() for of, each in sets.items()}


def save(name: str, result: dict, fitted: Machines) -> None:
    """Keeps the constants of that card with the program, its memory, and where the parties were."""
    cards = json.loads(machine.CARDS.read_text("utf-8")) if machine.CARDS.exists() else {}
    constants: dict[str, dict] = {links: {} for links, _ in fitted}
    for (links, of), found in fitted.items():
        constants[links][of] = rounded(found)
    facts = {what: result[what] for what in ("device", "memory", "made_by")}
    kept.save(machine.CARDS, cards | {name: {"constants": constants, **facts}})


def rounded(found: Machine) -> dict[str, float]:
    return {constant: float(f"{getattr(found, constant):.3g}") for constant in CONSTANTS}


def beyond(points: Points, machines: Machines) -> list[str]:
    """The runs whose prediction is off by more than ``WITHIN`` of what was measured."""
    found = []
    for which, measured in points.items():
        for point in measured if which in machines else ():
            predicted = point.predicted(machines[which])
            if abs(predicted / point.seconds - 1) > WITHIN:
                where = f"{point.name}, {', '.join(which)}"
                found.append(f"{where}: {predicted:.3g} s predicted, {point.seconds:.3g} s measured")
    return found


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="of all parties, or owner's,client's,dealer's (default: cuda)")
    runs = ["fitted", "checked", "whole", "none"]
    parser.add_argument("--runs", nargs="+", default=["fitted"], choices=runs, metavar="R", help=", ".join(runs))
    parser.add_argument("--links", nargs="+", default=list(LINKS), choices=list(LINKS), metavar="L", help="(both)")
    parser.add_argument(
        "--json", type=Path, metavar="F", help="keep the seconds; a run that is there is not made again"
    )
    parser.add_argument("--fit-all", action="store_true", help="fit to the checked runs too")
    parser.add_argument("--save", action="store_true", help="keep the fitted constants with the program")
    arguments = parser.parse_args()
    result = kept.load(arguments.json)
    runs, device = result.setdefault("runs", {}), result.setdefault("device", arguments.device)
    if device != arguments.device:
        parser.error(f"{arguments.json} is of parties on {device}; give --device {device}, or another file")
    for which in arguments.runs:
        for links in arguments.links if which != "none" else ():
            there = runs.setdefault(links, {})
            todo = {name: work for name, work in works(which).items() if name not in there}
            for name, run in measured(device, links, todo):
                there[name] = run
                result["memory"] = torch.cuda.get_device_properties(0).total_memory
                sign(result, "numba", device=device)
                kept.save(arguments.json, result)
                print(f"{name}, {links}: {json.dumps(run)}", flush=True)
    name = result["made_by"][-1]["card"] if "made_by" in result else card()
    fits, checks = points_of(runs, "fitted", "whole"), points_of(runs, "checked")
    if arguments.fit_all:
        fits, checks = points_of(runs, "fitted", "whole", "checked"), {}
    fitted = constants_of(fits)
    print_table(shown(fits, known_sets(name), fitted) + shown(checks, known_sets(name), fitted))
    for which, found in fitted.items():
        print(*which, rounded(found))
    if arguments.save and "made_by" in result:
        save(name, result, fitted)
    if wrong := beyond(checks, fitted if arguments.save else known_sets(name)):
        raise CryptenLLMError(f"predictions beyond {WITHIN:.0%}: {'; '.join(wrong)}")


if __name__ == "__main__":
    sys.exit(main())
