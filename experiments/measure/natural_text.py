"""How close a model on shares is to the same model in the clear, on text: greedy tokens, logits and perplexity.

    python -m experiments.measure.natural_text --json runs/natural_text.json
    python -m experiments.measure.natural_text --model FOLDER --text FILE --prompts 8 --length 256

The model is SmolLM2-135M-Instruct unless another is given; the text, English prose. The text is cut into prompts, each
the beginning of a sequence of its own. Every token of a prompt is a comparison under the same beginning (teacher
forcing): which token is the likeliest next one, and how likely the one is that follows. Engine ``wire`` computes with
shares, its three parties being threads of this process; **INSECURE** by purpose: all logits are opened to this process.
Where the likeliest token differs, the table gives the margin that ``plain`` had there, its best logit over the next.

With ``--json`` a prompt's figures are written when it is done, and a run that is started again goes on from there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import UsageError
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.links.transport import Transport
from crypten_llm.models.checkpoint import resolve_model
from crypten_llm.models.llama import Llama
from crypten_llm.precisions import DEFAULT, PRECISIONS
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.calibration import PROSE
from crypten_llm.session.party import Party
from experiments.tools import kept, real_model
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import print_table

TIMEOUT = 1800.0  # seconds of a party at its own part, on a machine that is busy with other things


def cut(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """``count`` stretches of ``length`` tokens of a text, evenly spread, without a token in common.

    Raises UsageError for a text that is too short.
    """
    if count < 1 or length < 2:
        raise UsageError(f"{count} prompts of {length} tokens: at least one is needed, of at least two tokens")
    if len(ids) < count * length:
        raise UsageError(
            f"the text has {len(ids)} tokens, and {count} prompts of {length} need {count * length}; give --prompts, "
            "--length, or a longer --text"
        )
    spread = len(ids) - length
    starts = [round(i * spread / (count - 1)) for i in range(count)] if count > 1 else [0]
    return [list(ids[start : start + length]) for start in starts]


def compared(ids: Sequence[int], plain: torch.Tensor, wire: torch.Tensor) -> dict:
    """Figures of one prompt. plain, wire: its logits [T, V]. Losses are sums over the T - 1 tokens that follow one."""
    best, found = plain.argmax(-1), wire.argmax(-1)
    top = plain.topk(2, -1).values
    following = torch.tensor(ids[1:])[:, None]
    losses = [-logits[:-1].double().log_softmax(-1).gather(-1, following).sum().item() for logits in (plain, wire)]
    return {
        "tokens": len(ids),
        "equal": int((best == found).sum()),
        "logit_error": (plain - wire).abs().max().item(),
        "mean_logit_error": (plain - wire).abs().mean().item(),
        "margins_lost": (top[:, 0] - top[:, 1])[best != found].tolist(),
        "loss_plain": losses[0],
        "loss_wire": losses[1],
    }


def summary(rows: Sequence[dict]) -> dict:
    """All prompts together."""
    tokens = sum(row["tokens"] for row in rows)
    losses = {side: sum(row[f"loss_{side}"] for row in rows) / (tokens - len(rows)) for side in ("plain", "wire")}
    margins = sorted(margin for row in rows for margin in row["margins_lost"])
    return {
        "prompts": len(rows),
        "tokens": tokens,
        "equal": sum(row["equal"] for row in rows),
        "agreement": sum(row["equal"] for row in rows) / tokens,
        "logit_error": max(row["logit_error"] for row in rows),
        "mean_logit_error": sum(row["mean_logit_error"] * row["tokens"] for row in rows) / tokens,
        "perplexity_plain": math.exp(losses["plain"]),
        "perplexity_wire": math.exp(losses["wire"]),
        "perplexity_off": math.expm1(losses["wire"] - losses["plain"]),
        "margins_lost": ", ".join(f"{margin:.2g}" for margin in margins) or "none",
    }


@torch.inference_mode()
def all_logits(model: Llama, ids: Sequence[int]):
    """Of every token of a prompt: a handle [T, V]."""
    one_hot = model.engine.tokens(torch.tensor(ids), len(ids), model.config.vocab_size)
    return model(one_hot, model.new_cache(), last_only=False)


def in_the_clear(model: str, text: str, count: int, length: int) -> list[tuple[list[int], torch.Tensor]]:
    """Prompts of a text, each with its logits [T, V] on engine ``plain``."""
    with PrivateLlama.from_pretrained(model, engine="plain") as plain:
        prompts = cut(plain.encode(text), count, length)
        return [(ids, all_logits(plain.party.model, ids)) for ids in prompts]


def measure(
    folder: Path,
    config: WireConfig,
    prompts: dict[str, tuple[list[int], torch.Tensor]],
    done: Callable[[str, dict], None],
) -> None:
    """Runs prompts, token ids and logits in the clear by name, on engine ``wire``; tells ``done`` what was found."""

    def play(transport: Transport) -> None:
        torch.set_num_threads(1)
        engine = WireEngine(transport, config)
        party = Party(engine, transport, compute_parties=2)
        party.load(folder if party.rank == OWNER else None)
        for name, (ids, clear) in tqdm(prompts.items(), unit="prompt", disable=party.rank != CLIENT):
            with engine.section(f"prompt {name}"):
                logits = all_logits(party.model, ids)
                shown = party.reveals.open_to_client(engine, logits, CLIENT, "all logits", "INSECURE: to compare them")
            if shown is not None:
                done(name, compared(ids, clear, shown.float()))

    run_roles(play, TIMEOUT)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"(default: {real_model.NAME}, which 'make demo-real' installs)")
    parser.add_argument("--text", type=Path, default=PROSE, help=f"a file of plain text (default: {PROSE.name})")
    parser.add_argument("--prompts", type=int, default=21, metavar="N")
    parser.add_argument("--length", type=int, default=96, metavar="T", help="tokens of a prompt")
    parser.add_argument("--exponent", type=int, default=WireConfig.exponent, help="bits of softmax's ring of exponents")
    parser.add_argument("--precision", default=DEFAULT, choices=PRECISIONS, help="bits of numbers (docs/precision.md)")
    parser.add_argument("--json", type=Path, help="results are kept here; an interrupted run goes on from them")
    arguments = parser.parse_args()

    model = str(resolve_model(arguments.model or real_model.found()))
    run = (
        f"{Path(model).stem}, {arguments.text.name}, {arguments.length} tokens, exponents in {arguments.exponent} bits"
        f"{'' if arguments.precision == DEFAULT else ', ' + arguments.precision}"
    )
    prompts = in_the_clear(model, arguments.text.read_text("utf-8"), arguments.prompts, arguments.length)
    named = {f"{run}, {i + 1} of {len(prompts)}": prompt for i, prompt in enumerate(prompts)}
    result = kept.load(arguments.json)
    found = result.setdefault("prompts", {})

    def save(name: str, row: dict) -> None:
        found[name] = row
        sign(result)
        result.setdefault("summary", {})[run] = summary([found[each] for each in named if each in found])
        kept.save(arguments.json, result)

    if missing := {name: prompt for name, prompt in named.items() if name not in found}:
        config = replace(WireConfig.of(arguments.precision), exponent=arguments.exponent)
        measure(Path(model), config, missing, save)
    print_table([summary([found[name] for name in named])])


if __name__ == "__main__":
    sys.exit(main())
