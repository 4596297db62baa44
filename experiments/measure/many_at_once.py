"""What serving many at once saves: tokens a second of several sequences beside one, and a chat's turn beside a prompt.

    python -m experiments.measure.many_at_once --repeats 5 --json
    python -m experiments.measure.many_at_once --model SmolLM2-135M-Instruct --prompt-tokens 512 --only turns

``sequences``: decode steps of SmolLM2's sizes after 256 tokens, of one sequence and of ``--sequences`` that take each
step together, from tapes, in turn; a whole token each, from its id to its logits. ``turns``: seconds until the first
token of a chat's second turn, whose cache the parties have kept, and of one prompt with all of the conversation's
tokens; both on engine ``wire`` with a live dealer, in turn. Ratios are the pairs'. All parties are on this machine.

With ``--json`` a pair is written when it is done, and a run that is started again goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

from tqdm import tqdm

from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.bench import Shape
from crypten_llm.session.calibration import PROSE
from experiments.measure.compare_engines import SHAPES, measure
from experiments.tools import kept, real_model
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import print_table

RESULTS = Path(__file__).parents[1] / "results" / "many_at_once.json"
TOKEN = replace(SHAPES["SmolLM2"], steps=3)
QUESTION = "And what else is said there?"
PARTS = ("sequences", "turns")


def of_sequences(sequences: int, shape: Shape, timeout: float) -> dict:
    shapes = [replace(shape, sequences=count) for count in (1, sequences)]
    one, many = (measure(each, "wire, tape", timeout)["seconds"] for each in shapes)
    return {"sequences": sequences, "one": one, "many": many, "ratio": sequences * one / many}


def of_turns(llama: PrivateLlama, tokens: int) -> dict:
    """Of a conversation whose first turn has so many tokens of prose."""
    prose = PROSE.read_text("utf-8")
    said = llama.tokenizer.decode(llama.tokenizer(prose, add_special_tokens=False)["input_ids"][:tokens])
    chat = llama.chat(max_new_tokens=4)
    first = chat.send(said)
    turn = chat.send(QUESTION)
    messages = [
        {"role": "user", "content": said},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": QUESTION},
    ]
    fresh = llama.generate(messages=messages, max_new_tokens=4, hide_length=False)
    chat.close()
    seconds = {"turn": turn.seconds["prefill"], "fresh": fresh.seconds["prefill"]}
    lengths = {"cached": turn.cached_tokens, "new": turn.prompt_tokens, "all": fresh.prompt_tokens}
    return {**lengths, **seconds, "ratio": seconds["turn"] / seconds["fresh"]}


def tables(result: dict) -> list[dict]:
    rows = []
    for part in PARTS:
        if pairs := result.get(part):
            ratios = sorted(pair["ratio"] for pair in pairs)
            rows.append(
                {"what": part, "pairs": len(pairs), "ratio": median(ratios), "from": ratios[0], "to": ratios[-1]}
            )
    return rows


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--sequences", type=int, default=8, metavar="N", help="that take a step together (default: 8)")
    parser.add_argument("--model", default=real_model.NAME, help=f"of turns (default: {real_model.NAME})")
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="T", help="of the first turn (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="pairs (default: 3)")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of every wait (default: 300)")
    parser.add_argument("--json", nargs="?", type=Path, const=RESULTS, metavar="F", help=f"write to F ({RESULTS.name})")
    arguments = parser.parse_args()
    result = kept.load(arguments.json)
    for part in arguments.only:
        pairs = result.setdefault(part, [])
        missing = range(len(pairs), arguments.repeats)
        if not missing:
            continue
        bar = tqdm(missing, part, unit="pair", disable=not sys.stderr.isatty())
        if part == "sequences":
            for _ in bar:
                pairs.append(of_sequences(arguments.sequences, TOKEN, arguments.timeout))
                sign(result)
                kept.save(arguments.json, result)
            continue
        model = real_model.resolved(arguments.model)
        with PrivateLlama.from_pretrained(model, engine="wire", timeout=arguments.timeout, progress=False) as llama:
            for _ in bar:
                pairs.append(of_turns(llama, arguments.prompt_tokens))
                sign(result)
                kept.save(arguments.json, result)
    print_table(tables(result))


if __name__ == "__main__":
    sys.exit(main())
