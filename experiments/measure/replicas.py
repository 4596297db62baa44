"""Groups of parties behind a balancer under a bursty load: waiting, a token's time and its cost, for 1 to 64 of them.

    python -m experiments.measure.replicas --json
    python -m experiments.measure.replicas --rate 2 --network wan --groups 16 32 64

A simulation (``experiments.replicas``), in seconds. A group is an owner, a dealer and a client on a machine each; what
its passes take is what ``cost`` predicts for SmolLM2's sizes, times what runs took by comparison, as the endpoint's
prices are: ``held`` has both (results/many_at_once.json, two cores for three parties), steps and prompts apart. The
load is that of ``experiments.replicas.load``, the same requests for every number of groups. A request whose price says
that it would miss the deadline is refused, as the endpoint does.

The last row is ``scaled``: the number of groups follows the rule and numbers of
deploy/kubernetes/client/base/scaling.yaml, up to the largest of ``--groups``. ``dealers`` are those that a pool of them
would need if passes took their material from a common stock, and ``stock_bytes`` what the worst burst would take out of
it. Latencies are those of a live dealer in each group: a stock is a group's own, and what is answered from it is
answered by itself.

A new group answers after 90 seconds: 43 were measured for sharing SmolLM2 and as many for compiling kernels anew, on
two cores that others used. ``machine_seconds_a_token``: three machines for as long as they are kept, by
the tokens of all answers.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from tqdm import tqdm

from crypten_llm.errors import UsageError
from crypten_llm.links.network import Network, parse_network
from crypten_llm.session.plan import DEFAULT_CHUNK
from experiments.measure.compare_engines import SHAPES
from experiments.replicas import scaler
from experiments.replicas.costs import Costs, counted
from experiments.replicas.groups import Outcome, Simulation
from experiments.replicas.load import Load, requests
from experiments.replicas.picture import draw
from experiments.replicas.stock import needed
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import print_table

RESULTS = Path(__file__).parents[1] / "results" / "replicas.json"
MEASURED = RESULTS.with_name("many_at_once.json")
GROUPS = (1, 2, 4, 8, 16, 32, 64)
ROOM = 8  # answers that grow at the same time: --together
MACHINES = 3  # of a group
EVERY = 60.0  # seconds over which arrivals are counted


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not pass; 0.0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def row(groups: int | str, outcome: Outcome, deadline: float, lasted: float) -> dict:
    answered = [request for request in outcome.requests if not request.refused]
    first = [request.first - request.arrived for request in answered]
    whole = [request.ended - request.arrived for request in answered]
    tokens = sum(request.answer for request in answered)
    pool = needed(outcome.dealt, lasted)
    return {
        "groups": groups,
        "refused": 1 - len(answered) / len(outcome.requests),
        "late": sum(taken > deadline for taken in whole) / max(1, len(answered)),
        "whole_p99": quantile(whole, 0.99),
        "first_token_p50": quantile(first, 0.5),
        "first_token_p99": quantile(first, 0.99),
        "token_p50": quantile(outcome.gaps, 0.5),
        "token_p99": quantile(outcome.gaps, 0.99),
        "mean_groups": outcome.seconds / lasted,
        "busy": outcome.busy / outcome.seconds,
        "machine_seconds_a_token": MACHINES * outcome.seconds / max(1, tokens),
        "dealers": pool.dealers,
        "stock_bytes": pool.stock,
    }


def held(costs: Costs) -> list[dict]:
    """Predictions beside what was measured: of a token, and of a whole prompt, by name of the phase."""
    measured = json.loads(MEASURED.read_text("utf-8"))
    pairs, turns = measured["sequences"], measured["turns"]
    found = []
    for sequences, name in ((1, "one"), (pairs[0]["sequences"], "many")):
        seconds, predicted = median(pair[name] for pair in pairs), costs.step(sequences).seconds
        what = f"a token of {sequences} side by side"
        found.append({"phase": "decode", "what": what, "measured": seconds, "predicted": predicted})
    tokens = turns[0]["all"]
    parts = [costs.part(begin, min(begin + costs.chunk, tokens)) for begin in range(0, tokens, costs.chunk)]
    seconds, predicted = median(turn["fresh"] for turn in turns), sum(max(p.seconds, p.dealing) for p in parts)
    what = f"a prompt of {tokens}, live dealer"
    return [*found, {"phase": "prefill", "what": what, "measured": seconds, "predicted": predicted}]


def ratios(rows: Sequence[dict]) -> list[float]:
    """Measured by predicted, of steps and of prompts."""
    phases = ("decode", "prefill")
    return [median(r["measured"] / r["predicted"] for r in rows if r["phase"] == phase) for phase in phases]


def simulate(costs: Costs, load: Load, groups: Sequence[int], arguments: argparse.Namespace) -> dict:
    asked = requests(load, 3600 * arguments.hours, arguments.seed)
    if not asked:
        raise UsageError(f"nobody asks in {arguments.hours:g} hours at --rate {load.rate:g}; raise one of them")
    same = {
        "start": arguments.start,
        "affinity": arguments.affinity,
        "deadline": arguments.deadline,
        "seed": arguments.seed,
    }
    rows = []
    for count in tqdm([*groups, "scaled"], unit="run", disable=not sys.stderr.isatty()):
        by = scaler.Scaler(scaler.read(), max(groups)) if count == "scaled" else None
        begin = scaler.read().least if by else count
        outcome = Simulation(costs, copy.deepcopy(asked), begin, by, **same).run()
        lasted = max(request.ended for request in outcome.requests)
        rows.append(row(count, outcome, arguments.deadline, max(lasted, asked[-1].arrived)))
    counts = [0] * (int(asked[-1].arrived / EVERY) + 1)
    for request in asked:
        counts[int(request.arrived / EVERY)] += 1
    return {"rows": rows, "looks": outcome.looks, "arrivals": {"every": EVERY, "counts": counts}}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Load()
    add = parser.add_argument
    add("--groups", type=int, nargs="+", default=GROUPS, metavar="N", help="how many (default: 1 to 64)")
    add("--rate", type=float, default=usual.rate, metavar="R", help=f"requests a second (default: {usual.rate:g})")
    add("--hours", type=float, default=2.0, metavar="H", help="that the load lasts (default: 2)")
    add("--deadline", type=float, default=300.0, metavar="S", help="of every request, in seconds (default: 300)")
    add("--start", type=float, default=90.0, metavar="S", help="until a new group answers (default: 90)")
    add("--affinity", type=float, default=300.0, metavar="S", help="for which a user stays with a group (default: 300)")
    add("--chunk", type=int, default=DEFAULT_CHUNK, metavar="T", help=f"of a prompt in a pass ({DEFAULT_CHUNK})")
    add("--network", default="lan", metavar="lan|wan|RTTms,Mbit", help="between the parties (default: lan)")
    add("--seed", type=int, default=1, help="of the load (default: 1)")
    add("--json", nargs="?", type=Path, const=RESULTS, metavar="F", help=f"write to F ({RESULTS.name}), and a picture")
    arguments = parser.parse_args()
    if min(arguments.groups) < 1 or not arguments.rate > 0 or not arguments.hours > 0 or arguments.chunk < 1:
        raise UsageError("--groups, --rate, --hours and --chunk must be above 0")
    load = replace(usual, rate=arguments.rate)
    network: Network = parse_network(arguments.network)
    compared = held(counted(SHAPES["SmolLM2"], load.longest, ROOM, DEFAULT_CHUNK, None))
    costs = counted(SHAPES["SmolLM2"], load.longest, ROOM, arguments.chunk, network).scaled(*ratios(compared))
    found = simulate(costs, load, sorted(arguments.groups), arguments)
    asked = {name: value for name, value in vars(arguments).items() if name not in ("json", "groups")}
    steps = [asdict(costs.step(sequences)) for sequences in (1, ROOM)]
    passes = {"steps": steps, "chunk": asdict(costs.part(0, arguments.chunk))}
    result = {"asked": asked, "load": asdict(load), "passes": passes, "held": compared, **found}
    sign(result)
    kept.save(arguments.json, result)
    if arguments.json:
        draw(result, arguments.json.with_suffix(".png"))
    print_table(found["rows"])
    print_table(compared)


if __name__ == "__main__":
    sys.exit(main())
