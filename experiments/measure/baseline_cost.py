"""What a private engine costs per prefill and per token, by prompt length.

    python -m experiments.measure.baseline_cost --engine crypten --lengths 128 256 512 --json runs/baseline_cost.json
    python -m experiments.measure.baseline_cost --engine wire --tape --lengths 512 1024 2048

One session answers a prompt of each length; the cost is what the parties' transports counted. Seconds are the
client's wall clock on this machine, per token their mean. Bytes are those of the party that sent
most, dealer bytes all that went between the dealer and the parties. Prompt tokens are random: no cost depends on them.
With ``--tape`` each prompt has a session of its own, whose tape is dealt before (``deal_seconds``) and then removed.

With ``--json`` every length is written when it is done, and a run that is started again goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random
from time import perf_counter

from tqdm import tqdm

from crypten_llm.commands.deal import deal
from crypten_llm.models.checkpoint import resolve_config
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.plan import Plan
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import print_table, readable

COUNTS = ("rounds", "bytes_sent", "dealer_bytes")


def measure(llama: PrivateLlama, length: int, tokens: int) -> dict:
    """Cost of one prefill of ``length`` tokens and of each of ``tokens`` decode steps after it."""
    draw = Random(length)
    ids = [draw.randrange(llama.config.vocab_size) for _ in range(length)]
    # Hiding the length runs every step, whatever the answer.
    result = llama.generate(input_ids=ids, max_new_tokens=tokens + 1, hide_length=True)
    row = {"prompt_tokens": length, "prefill_seconds": round(result.seconds["prefill"], 2)}
    for phase, name, steps in (("prefill", "prefill", 1), ("decode", "token", tokens)):
        cost, only = result.cost, (phase,)
        counted = cost.rounds(only), max(cost.bytes_sent(only)), cost.dealer_bytes(only)
        row |= {f"{name}_{kind}": count // steps for kind, count in zip(COUNTS, counted, strict=True)}
    return row | {"token_seconds": round(result.cost.seconds("decode") / tokens, 3)}


def measure_with_tape(model: str, settings: dict, length: int, tokens: int) -> dict:
    """``measure`` without a dealer: its work is done before, in ``deal_seconds``, and read from the disk."""
    with tempfile.TemporaryDirectory(prefix="tape-") as folder:
        tape, started = str(Path(folder) / "tape"), perf_counter()
        plan = Plan(length, tokens + 1, hide_length=True)
        deal(plan, tape, LlamaConfig.from_folder(resolve_config(model)), say=lambda line: None)
        seconds = round(perf_counter() - started, 1)
        with PrivateLlama.from_pretrained(model, tape=tape, **settings) as llama:
            return measure(llama, length, tokens) | {"deal_seconds": seconds}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--engine", default="crypten")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512, 1024], metavar="T")
    parser.add_argument("--tape", action="store_true", help="deal a tape before each prompt: engine wire alone")
    parser.add_argument("--tokens", type=int, default=3, help="decode steps measured after each prefill")
    parser.add_argument("--network", default="", help="emulate lan, wan or RTTms,Mbit between the parties")
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--json", type=Path, help="results are kept here; an interrupted run goes on from them")
    arguments = parser.parse_args()

    engine = arguments.engine + (", tape" if arguments.tape else "")

    def key(length: int) -> str:
        return f"{arguments.model}/{engine}/{arguments.network or 'loopback'}/{arguments.tokens}/{length}"

    result = kept.load(arguments.json)
    rows = result.setdefault("rows", {})
    missing = [length for length in arguments.lengths if key(length) not in rows]

    def keep(length: int, row: dict) -> None:
        rows[key(length)] = row
        sign(result, "crypten")
        kept.save(arguments.json, result)

    if missing:
        progress = tqdm(missing, unit="prompt")
        settings = {"engine": arguments.engine, "network": arguments.network, "timeout": arguments.timeout}
        if arguments.tape:
            for length in progress:
                keep(length, measure_with_tape(arguments.model, settings, length, arguments.tokens))
        else:
            with PrivateLlama.from_pretrained(arguments.model, **settings) as llama:
                for length in progress:
                    keep(length, measure(llama, length, arguments.tokens))
    print_table([readable(rows[key(length)]) for length in arguments.lengths])


if __name__ == "__main__":
    sys.exit(main())
