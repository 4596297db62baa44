"""Held-out exact match per task and prompt length, and the activation ranges of the model.

    python -m experiments.model.evaluate --lengths 1024 2048 --samples 500
    python -m experiments.model.evaluate --ranges --lengths 2048 --samples 16

Any engine can be evaluated: `exact_match` needs only `generate_ids(prompt_ids, max_new_tokens) -> list[int]`. For
the Hugging Face model a batched form is faster: a greedy decoder emits exactly the reference answer if and only if
every token of the answer and the `</s>` after it is the argmax given the ones before, so one forward pass over
prompt and answer decides the match.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.session.api import PrivateLlama
from experiments.model.corpus import MAX_ANSWER_TOKENS, Encoder, Sample, sample
from experiments.model.drafts import TASKS
from experiments.model.forward import Activations, logits
from experiments.tools.command import command
from experiments.tools.processes import processes
from experiments.tools.tables import print_table

GenerateIds = Callable[[list[int], int], list[int]]


def is_match(generated: list[int], answer: str, tokenizer) -> bool:
    """Whether the generated ids, up to the first `</s>`, decode to `answer` (surrounding space ignored)."""
    eos = tokenizer.eos_token_id
    ended = generated[: generated.index(eos)] if eos in generated else generated
    return tokenizer.decode(ended).strip() == answer.strip()


def exact_match(generate_ids: GenerateIds, tokenizer, drawn: Iterable[Sample]) -> float:
    """Share of samples whose greedy continuation is the answer. Raises ValueError on no samples."""
    matches = [
        is_match(generate_ids(tokenizer(s.prompt)["input_ids"], MAX_ANSWER_TOKENS), s.answer, tokenizer) for s in drawn
    ]
    if not matches:
        raise ValueError("no samples to evaluate: give at least one")
    return sum(matches) / len(matches)


def _batches(drawn: list[Sample], encode: Encoder, tokens: int, device):
    """Right-padded batches of about `tokens` tokens: ids (B,T) and answers (B,T), True at targets to be predicted."""
    rows = []
    for s in drawn:
        prompt, answer = [encode.bos, *encode(s.prompt)], encode(s.answer)
        # Stories have no answer: every token after the first is to be predicted.
        rows.append((prompt + answer + [encode.eos], len(prompt)) if s.answer else (prompt, 1))
    rows.sort(key=lambda row: len(row[0]))
    while rows:
        count = max(1, tokens // len(rows[-1][0]))
        rows, part = rows[:-count], rows[-count:]
        width = len(part[-1][0])
        ids = torch.full((len(part), width), encode.pad)
        answers = torch.zeros(len(part), width, dtype=torch.bool)
        for i, (row, start) in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            answers[i, start : len(row)] = True
        yield ids.to(device), answers.to(device)


@torch.no_grad()
def score(model, encode: Encoder, drawn: list[Sample], batch_tokens: int = 1 << 16, autocast: bool = False) -> dict:
    """Exact match, smallest and median logit margin of answer tokens (best logit over the next), and perplexity.

    For stories, which have no answer, the perplexity is over all tokens, else over the answer's. Raises ValueError
    on no samples.
    """
    if not drawn:
        raise ValueError("no samples to evaluate: give at least one")
    device, right, margins, loss, count = model.device, 0, [], 0.0, 0
    precision = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    for ids, answers in _batches(drawn, encode, batch_tokens, device):
        with precision:
            out = logits(model, ids)[:, :-1]
        targets, wanted = ids[:, 1:], answers[:, 1:]
        right += ((out.argmax(-1) == targets) | ~wanted).all(1).sum().item()
        best = out[wanted].topk(2).values
        margins.append((best[:, 0] - best[:, 1]).cpu())
        loss += F.cross_entropy(out[wanted], targets[wanted], reduction="sum").item()
        count += wanted.sum().item()
    margins = torch.cat(margins)
    return {
        "exact_match": right / len(drawn),
        "samples": len(drawn),
        "perplexity": math.exp(loss / count),
        "margin_min": margins.min().item(),
        "margin_median": margins.median().item(),
    }


class Ranges:
    """Largest magnitudes of what the model computes, layer by layer; call `see` from `forward.logits`."""

    def __init__(self):
        self.rows: dict[str, dict[str, float]] = {}

    def _note(self, place: str, name: str, value: float, keep=max) -> None:
        row = self.rows.setdefault(place, {})
        row[name] = keep(row.get(name, value), value)

    def _residual(self, place: str, x: torch.Tensor) -> None:
        squares = x.square().mean(-1)
        self._note(place, "mean_square_min", squares.min().item(), min)
        self._note(place, "mean_square_max", squares.max().item())
        self._note(place, "residual", x.abs().max().item())

    def see(self, index: int | None, a: Activations | torch.Tensor) -> None:
        if index is None:
            return self._residual("final norm", a)
        place = f"layer {index}"
        self._residual(f"{place} attention", a.attention_input)
        self._residual(f"{place} ffn", a.ffn_input)
        group = a.q.shape[1] // a.k.shape[1]
        causal = torch.ones(a.q.shape[2], a.q.shape[2], dtype=torch.bool, device=a.q.device).tril()
        for q, k in zip(a.q, a.k, strict=True):
            # One row at a time: the scores of a whole batch would not fit.
            scores = q @ k.repeat_interleave(group, 0).mT / math.sqrt(q.shape[-1])
            self._note(f"{place} attention", "score", scores[:, causal].abs().max().item())
        self._note(f"{place} attention", "q", a.q.abs().max().item())
        self._note(f"{place} attention", "k", a.k.abs().max().item())
        self._note(f"{place} attention", "v", a.v.abs().max().item())
        self._note(f"{place} ffn", "gate", a.gate.abs().max().item())
        self._note(f"{place} ffn", "up", a.up.abs().max().item())
        self._note(f"{place} ffn", "silu(gate) * up", (F.silu(a.gate) * a.up).abs().max().item())


@torch.no_grad()
def measure_ranges(model, encode: Encoder, drawn: list[Sample]) -> dict[str, dict[str, float]]:
    """Ranges in float32 over whole samples, prompt and answer, one sample at a time so that no padding is seen."""
    ranges = Ranges()
    for ids, _ in _batches(drawn, encode, 1, model.device):
        out = logits(model, ids, ranges.see)
        ranges._note("logits", "logit", out.abs().max().item())
    weights = max(p.abs().max().item() for p in model.parameters())
    return {**ranges.rows, "weights": {"weight": weights}}


_encode: Encoder


def _start_worker(folder: str) -> None:
    global _encode
    _encode = Encoder(AutoTokenizer.from_pretrained(folder))


def _draw(arguments: tuple) -> Sample:
    task, length, index, split, seed = arguments
    return sample(task, length, index, _encode, split, seed)


def draw_all(folder: Path | str, tasks, lengths, count: int, split: str = "heldout", seed: int = 0, workers: int = 1):
    """`count` samples for each (task, length), written by `workers` processes."""
    keys = [(task, length) for length in lengths for task in tasks]
    jobs = [(task, length, i, split, seed) for task, length in keys for i in range(count)]
    if workers > 1:
        with processes(workers, _start_worker, str(folder)) as found:
            drawn = list(found.map(_draw, jobs))
    else:
        _start_worker(str(folder))
        drawn = [_draw(job) for job in jobs]
    return {key: drawn[i * count : (i + 1) * count] for i, key in enumerate(keys)}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the model (default: the shipped one)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 2048], help="prompt tokens")
    parser.add_argument("--samples", type=int, default=500, help="per task and length")
    parser.add_argument("--split", default="heldout", choices=["heldout", "train"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", help="decode token by token with this engine of the project: plain, crypten, wire")
    parser.add_argument("--ranges", action="store_true", help="measure activation ranges instead of exact match")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-tokens", type=int, default=None, help="tokens in one forward pass")
    parser.add_argument("--workers", type=int, default=1, help="processes that write samples")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        parser.error(f"--model {args.model} has no config.json: give a folder that train.py wrote, or leave it out")

    drawn = draw_all(args.model, args.tasks, args.lengths, args.samples, args.split, args.seed, args.workers)
    if args.engine:
        return report(decode_all(args.engine, args.model, drawn), args.json)
    # Half-precision weights on disk, float32 arithmetic: the reference that the private engines are compared with.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encode = Encoder(tokenizer)
    if args.ranges:
        everything = [s for part in drawn.values() for s in part]
        result = measure_ranges(model, encode, everything)
        report([{"place": place, **row} for place, row in result.items()], args.json)
    else:
        result = []
        for (task, length), part in tqdm(drawn.items(), unit="task"):
            row = {"task": task, "tokens": length}
            row |= score(model, encode, part, args.batch_tokens or (1 << 17 if args.device != "cpu" else 1 << 13))
            if task == "stories":
                del row["exact_match"]
            result.append(row)
        report(result, args.json)


def decode_all(engine: str, model: Path, drawn: dict) -> list[dict]:
    """Exact match by decoding with an engine of the project; ``stories`` has no answers and is left out."""
    rows = []
    with PrivateLlama.from_pretrained(str(model), engine=engine) as llama:

        def generate_ids(prompt_ids: list[int], max_new_tokens: int) -> list[int]:
            return llama.generate(input_ids=prompt_ids, max_new_tokens=max_new_tokens).token_ids

        for (task, length), part in drawn.items():
            if task != "stories":
                progress = tqdm(part, desc=f"{task}, {length}", unit="sample", leave=False)
                match = exact_match(generate_ids, llama.tokenizer, progress)
                rows.append({"task": task, "tokens": length, "exact_match": match, "samples": len(part)})
    return rows


def report(rows: list[dict], path: Path | None) -> None:
    """Prints the table and, given a path, writes the rows there."""
    print_table(rows)
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
