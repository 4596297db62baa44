"""How close a model on shares is to the same model in the clear, on text: greedy tokens, logits and perplexity.

    python -m experiments.measure.natural_text --model FOLDER --text FILE --json runs/natural_text.json

The text is cut into prompts, each the beginning of an own sequence. Every token of a prompt is a comparison under the
same beginning (teacher forcing): which token is the likeliest next one, and how likely the one is that follows. Engine
``wire`` computes with shares, its three parties being threads of this process; **INSECURE** by purpose: all logits are
opened to this process. Where the likeliest token differs, the table gives the margin that ``plain`` had there, its best
logit over the next.

With ``--json`` a prompt's figures are written when it is done, and a run that is started again goes on from there.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import UsageError
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.links.transport import Transport
from crypten_llm.models.checkpoint import resolve_model
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.party import Party
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import print_table


def cut(text: str, encode, count: int, length: int) -> list[list[int]]:
    """``count`` prompts of ``length`` tokens, evenly spread over a text's paragraphs."""
    ids = encode(text)
    if len(ids) < count * length:
        raise UsageError(f"the text has {len(ids)} tokens, and {count} prompts of {length} need {count * length}")
    step = (len(ids) - length) // max(1, count - 1)
    return [ids[i * step : i * step + length] for i in range(count)]


def compared(ids: list[int], plain: torch.Tensor, wire: torch.Tensor) -> dict:
    """plain, wire: logits [T, V] of a prompt."""
    best, found = plain.argmax(-1), wire.argmax(-1)
    top = plain.topk(2, -1).values
    differs = (best != found).nonzero()[:, 0]
    following = torch.tensor(ids[1:])[:, None]
    losses = [-logits[:-1].double().log_softmax(-1).gather(-1, following).sum().item() for logits in (plain, wire)]
    return {
        "tokens": len(ids),
        "equal": int((best == found).sum()),
        "logit_error": (plain - wire).abs().max().item(),
        "mean_logit_error": (plain - wire).abs().mean().item(),
        "margins_lost": [(top[i, 0] - top[i, 1]).item() for i in differs],
        "predicted": len(ids) - 1,
        "loss_plain": losses[0],
        "loss_wire": losses[1],
    }


@torch.inference_mode()
def measure(
    folder: Path, config: WireConfig, prompts: dict[str, list[int]], clear: dict[str, torch.Tensor], done
) -> None:
    """Runs the prompts on engine ``wire``; done: called with a prompt's name and what was found."""

    def play(transport: Transport) -> None:
        engine = WireEngine(transport, config)
        party = Party(engine, transport, compute_parties=2)
        party.load(folder if party.rank == OWNER else None)
        model = party.model
        bar = tqdm(total=len(prompts), desc="wire", unit="prompt", disable=party.rank != CLIENT)
        for name, ids in prompts.items():
            with engine.section(f"prompt {name}"):
                one_hot = engine.tokens(torch.tensor(ids), len(ids), model.config.vocab_size)
                logits = model(one_hot, model.new_cache(), last_only=False)
                shown = party.reveals.open_to_client(engine, logits, CLIENT, "all logits", "INSECURE: to compare them")
            if shown is not None:
                done(name, compared(ids, clear[name], shown.float()))
            bar.update()
        bar.close()

    run_roles(play)


def summary(rows: list[dict]) -> dict:
    tokens, predicted = sum(row["tokens"] for row in rows), sum(row["predicted"] for row in rows)
    perplexity = {side: math.exp(sum(row[f"loss_{side}"] for row in rows) / predicted) for side in ("plain", "wire")}
    margins = sorted(margin for row in rows for margin in row["margins_lost"])
    return {
        "prompts": len(rows),
        "tokens": tokens,
        "equal": sum(row["equal"] for row in rows),
        "agreement": sum(row["equal"] for row in rows) / tokens,
        "logit_error": max(row["logit_error"] for row in rows),
        "mean_logit_error": sum(row["mean_logit_error"] * row["tokens"] for row in rows) / tokens,
        "perplexity_plain": perplexity["plain"],
        "perplexity_wire": perplexity["wire"],
        "perplexity_off": perplexity["wire"] / perplexity["plain"] - 1,
        "margins_lost": ", ".join(f"{margin:.2g}" for margin in margins) or "none",
    }


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--text", type=Path, required=True, help="a file of plain text")
    parser.add_argument("--prompts", type=int, default=21)
    parser.add_argument("--length", type=int, default=96, help="tokens of a prompt")
    parser.add_argument("--exponent", type=int, default=WireConfig.exponent, help="bits of softmax's ring of exponents")
    parser.add_argument("--json", type=Path, help="results are kept here; an interrupted run goes on from them")
    arguments = parser.parse_args()

    result = kept.load(arguments.json)
    found = result.setdefault("prompts", {})
    with PrivateLlama.from_pretrained(arguments.model, engine="plain") as plain:
        ids = cut(arguments.text.read_text("utf-8"), plain.encode, arguments.prompts, arguments.length)
        label = f"{arguments.model}/{arguments.text.name}/{arguments.exponent}/{arguments.length}"
        prompts = {f"{label}/{i}": part for i, part in enumerate(ids)}
        missing = {name: part for name, part in prompts.items() if name not in found}
        clear = {name: logits_in_the_clear(plain, part) for name, part in missing.items()}

    def save(name: str, row: dict) -> None:
        found[name] = row
        sign(result)
        rows = [found[name] for name in prompts if name in found]
        result["summary"] = {**result.get("summary", {}), label: summary(rows)}
        kept.save(arguments.json, result)

    if missing:
        measure(resolve_model(arguments.model), WireConfig(exponent=arguments.exponent), missing, clear, save)
    print_table([{"model": arguments.model, **summary([found[name] for name in prompts])}])


@torch.inference_mode()
def logits_in_the_clear(plain: PrivateLlama, ids: list[int]) -> torch.Tensor:
    """[T, V]."""
    model = plain.party.model
    one_hot = model.engine.tokens(torch.tensor(ids), len(ids), model.config.vocab_size)
    return model(one_hot, model.new_cache(), last_only=False)


if __name__ == "__main__":
    sys.exit(main())
