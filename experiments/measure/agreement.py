"""How often a private engine chooses the token that ``plain`` chooses, on held-out prompts.

    python -m experiments.measure.agreement --engine crypten --samples 20 --tokens 10 --json runs/agreement.json

Both engines decode greedily from the same prompts, each from its own tokens, so after a difference the rest of that
answer mostly differs too. With ``--follow`` the private engine goes on from the tokens of ``plain`` instead, so that
every token is compared under the same beginning; an answer without a difference is the same either way. For each
difference (without ``--follow``, each first one) the table gives the margin that ``plain`` had there (its best logit
over the next) beside the private engine's error in the logits: where the margin is smaller than the error, the
difference is due to the arithmetic and the two tokens were nearly equal.

With ``--json`` every sample is written when it is done, and a run that is started again goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import Answer
from experiments.model.corpus import Encoder, sample
from experiments.model.drafts import TASKS
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import print_table

LONG_ANSWERS = ["stories", "few_shot", "span_copy"]  # tasks whose greedy answers reach ten tokens


def greedy(
    llama: PrivateLlama, ids: list[int], tokens: int, follow=(), policy: str = "full"
) -> tuple[list[int], torch.Tensor]:
    """The answer's token ids under an eviction policy, and the logits [tokens, V] that the client saw for each.

    follow: token ids that the answer goes on from, whatever the logits say.
    """
    rows = []

    def choose(logits: torch.Tensor) -> int:
        rows.append(logits.float().clone())
        return follow[len(rows) - 1] if follow else int(logits.argmax())

    answer = Answer(ids, choose, llama.config.eos_token_ids)
    for _ in llama.party.request_generate(Plan(len(ids), tokens, policy=policy).check(llama.config), answer):
        pass
    logits = torch.stack(rows)
    return logits.argmax(-1).tolist(), logits


def compare(expected: tuple, found: tuple, followed: bool) -> dict:
    """Agreement of one answer; unless ``followed``, logits after the first difference do not belong together."""
    (clear, clear_logits), (private, logits) = expected, found
    equal = [a == b for a, b in zip(clear, private, strict=False)] + [False] * (len(clear) - len(private))
    same = equal.index(False) + 1 if False in equal and not followed else len(clear)
    together = min(same, len(private))
    row = {"tokens": len(clear), "agree": sum(equal), "equal": clear == private}
    row["logit_error"] = (logits[:together] - clear_logits[:together]).abs().max().item()
    best = clear_logits[:together].topk(2).values
    margins = (best[:, 0] - best[:, 1]).tolist()
    row["margins_lost"] = [margin for margin, held in zip(margins, equal, strict=False) if not held]
    return row


def measure(arguments, bits: int, references: dict, results: dict, save) -> None:
    """Fills ``results`` for this precision, sample by sample."""
    missing = [key for key in references if f"{bits}/{key}" not in results]
    if not missing:
        return
    settings = {"precision_bits": bits, "timeout": arguments.timeout}
    with PrivateLlama.from_pretrained(arguments.model, engine=arguments.engine, **settings) as llama:
        for key in tqdm(missing, desc=f"{arguments.engine}, {bits} bits", unit="prompt"):
            ids, expected = references[key]
            results[f"{bits}/{key}"] = compare(
                expected,
                greedy(llama, ids, arguments.tokens, expected[0] if arguments.follow else ()),
                arguments.follow,
            )
            save()


def summary(rows: list[dict]) -> dict:
    tokens, margins = sum(row["tokens"] for row in rows), sum((row["margins_lost"] for row in rows), [])
    return {
        "prompts": len(rows),
        "tokens": tokens,
        "agreement": sum(row["agree"] for row in rows) / tokens,
        "answers_equal": sum(row["equal"] for row in rows) / len(rows),
        "logit_error": max(row["logit_error"] for row in rows),
        "margins_lost": ", ".join(f"{margin:.2g}" for margin in sorted(margins)) or "none",
    }


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--engine", default="crypten")
    parser.add_argument("--precision-bits", nargs="+", type=int, default=[15], metavar="F")
    parser.add_argument("--tasks", nargs="+", default=LONG_ANSWERS, choices=list(TASKS), metavar="TASK")
    parser.add_argument("--samples", type=int, default=20, help="prompts, taken from the tasks in turn")
    parser.add_argument("--length", type=int, default=160, help="prompt tokens, at most")
    parser.add_argument("--tokens", type=int, default=10, help="new tokens per prompt, at most")
    parser.add_argument("--follow", action="store_true", help="go on from the tokens of plain")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--json", type=Path, help="results are kept here; an interrupted run goes on from them")
    arguments = parser.parse_args()

    references, result = {}, kept.load(arguments.json)
    with PrivateLlama.from_pretrained(arguments.model, engine="plain") as plain:
        encode = Encoder(plain.tokenizer)
        for index in range(arguments.samples):
            task = arguments.tasks[index % len(arguments.tasks)]
            ids = plain.encode(sample(task, arguments.length, index, encode).prompt)
            mode = "follow" if arguments.follow else "free"
            key = f"{arguments.engine}/{mode}/{task}/{arguments.length}/{arguments.tokens}/{index}"
            references[key] = ids, greedy(plain, ids, arguments.tokens)
    results = result.setdefault("samples", {})

    def table() -> list[dict]:
        done = {bits: [results[k] for key in references if (k := f"{bits}/{key}") in results] for bits in chosen}
        return [{"precision_bits": bits, **summary(rows)} for bits, rows in done.items() if rows]

    def save() -> None:
        sign(result, "crypten")
        result["summary"] = table()
        kept.save(arguments.json, result)

    chosen = arguments.precision_bits
    for bits in chosen:
        measure(arguments, bits, references, results, save)
    print_table(table())


if __name__ == "__main__":
    sys.exit(main())
