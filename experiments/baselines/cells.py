"""The cells of ``compare_baselines``: accuracy, secure cost and private answers, each kept when it is done.

Owns the work and what a row of the results holds. Accuracy and cost of a policy come from the same text of settings.

kind "accuracy": of one block of examples of a task and length, by policy's text: the scores, and the mean shares of
rows kept and attended to. kind "cost": of one policy's decode step after a prompt of a length, all layers, on an
engine: bytes on all links and from the dealer, rounds, and what seconds follow from (``seconds``). kind "private": one
prompt answered on engine ``wire``, compared with ``plain``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from tqdm import tqdm

from crypten_llm.links.network import parse_network
from crypten_llm.models.checkpoint import load_tokenizer
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.bench import Shape
from crypten_llm.session.settings import split
from experiments.baselines.config import Config
from experiments.baselines.policies import at_budget, has_budget
from experiments.measure import agreement, eviction_counts
from experiments.measure.eviction_counts import ATTENTION, NUMBER, count, fills
from experiments.measure.eviction_time import measured_step
from experiments.measure.quality import Evaluator, draw, means
from experiments.tasks import find
from experiments.tools import real_model
from experiments.tools.journal import Journal
from experiments.tools.processes import processes

BLOCK = 10  # examples of an accuracy cell


@dataclass(frozen=True)
class Entry:
    """A row of a table: a policy's name, its budget (``None`` for one that has none), and its text at a length."""

    name: str
    budget: float | None
    text: str


def entries(names: Sequence[str], budgets: Sequence[float], length: int, heads: int) -> list[Entry]:
    """Each policy at each budget; once where it has none."""
    return [
        Entry(name, budget, at_budget(name, budget, length, heads))
        for name in names
        for budget in (budgets if has_budget(name) else (None,))
    ]


def ablation(config: Config, length: int, heads: int) -> list[Entry]:
    """Rows of the ablation at a length; none where it is not asked for."""
    parts = config.ablation
    return entries(parts.rows, parts.budgets, length, heads) if length in parts.lengths else []


def texts(config: Config, length: int, heads: int) -> list[str]:
    """All policies at a length, each once."""
    found = entries(config.policies, config.budgets, length, heads) + ablation(config, length, heads)
    return list(dict.fromkeys(entry.text for entry in found))


def watched(items, what: str, unit: str, total: int | None = None) -> tqdm:
    """``items``, with a bar that tells how far they are and how long the rest will take."""
    return tqdm(items, desc=what, total=total, unit=unit, disable=not sys.stderr.isatty(), smoothing=0.05)


def measure_accuracy(config: Config, journal: Journal, heads: int, workers: int, device: str = "cpu") -> None:
    """Scores of every policy on every example, length by length; policies that miss the same blocks share prefills.

    device: where engine ``plain`` computes; a cell says so where it is not the processor.
    """
    done = {
        (row["task"], row["length"], row["first"], text): len(cell["scores"])
        for row in journal.of("accuracy")
        for text, cell in row["policies"].items()
    }
    todo: dict[tuple, list] = {}  # blocks of examples by length and the policies that they miss
    for length in config.lengths:
        every = texts(config, length, heads)
        for task in config.tasks:
            count = config.count(task, length)
            for first in range(0, count, BLOCK):
                size = min(BLOCK, count - first)
                missing = tuple(text for text in every if done.get((task, length, first, text), 0) < size)
                if missing:
                    todo.setdefault((length, missing), []).append((task, first, size))
    total = sum(count * len(policies) for (_, policies), blocks in todo.items() for _, _, count in blocks)
    if not total:
        return
    tokenizer = load_tokenizer(real_model.resolved(config.model), config.offline)
    where = {} if device == "cpu" else {"device": device}
    with watched(None, "accuracy", "answer", total) as progress:
        with Evaluator(config.model, workers, config.offline, device) as evaluator:
            for (length, policies), blocks in todo.items():
                rows = evaluator.rows(_examples(config, tokenizer, length, blocks), policies)
                for task, first, size in blocks:
                    found = {text: [] for text in policies}
                    for row in islice(rows, size * len(found)):
                        found[row["policy"]].append(row)
                        progress.update()
                    cell = {"kind": "accuracy", "task": task, "length": length, "first": first, **where}
                    journal.append(cell | {"policies": {text: _scores(part) for text, part in found.items()}})


def _examples(config: Config, tokenizer, length: int, blocks) -> Iterator:
    for task in dict.fromkeys(task for task, _, _ in blocks):
        drawn = _drawn(config, tokenizer, task, length, config.count(task, length))
        for name, first, size in blocks:
            if name == task:
                yield from drawn[first : first + size]


def _drawn(config: Config, tokenizer, task: str, length: int, count: int) -> list:
    data = config.data.get(find(task).source)
    return draw(task, tokenizer, length, count, config.seed, data, config.offline)


def _scores(rows: list[dict]) -> dict:
    shares = {name: share and round(share, 4) for name, share in means(rows).items() if name in ("kept", "attended")}
    scores = [int(row["score"]) if row["score"] in (0, 1) else round(row["score"], 5) for row in rows]
    return {"scores": scores, **shares}


def count_costs(config: Config, journal: Journal, shape: Shape, workers: int) -> None:
    """Exact cost of a decode step on engine ``wire``, of each policy at each length."""
    done = {(row["length"], row["policy"]) for row in journal.of("cost") if row["engine"] == "wire"}
    todo = [
        replace(shape, kv_len=length, policy=text)
        for length in config.lengths
        for text in texts(config, length, shape.heads)
        if (length, text) not in done
    ]
    if not todo:
        return
    with processes(workers, torch.set_num_threads, 1) as found:
        for row in watched(found.map(_counted, todo), "cost", "step", len(todo)):
            journal.append(row)


def _counted(shape: Shape) -> dict:
    step = count(shape)
    everything = {kind for kind, _ in step.counts}
    row = {"kind": "cost", "engine": "wire", "length": shape.kv_len, "policy": shape.policy}
    for part, kinds in (("", everything), ("attention_", ATTENTION)):
        for name, what in (("rounds", "rounds"), ("online_bytes", "online"), ("dealer_bytes", "dealer")):
            row[part + name] = float(step.total(what, kinds))
    return row | {"work": step.work(), "cache_bytes": NUMBER * (step.cached + step.summaries)}


def seconds(row: dict, network: str) -> float:
    """Of a decode step's layers, from a row of kind "cost": predicted on engine ``wire``, measured on ``crypten``, with
    the network's part added."""
    if row["engine"] == "wire":
        return eviction_counts.seconds(row["work"], network)
    return row["seconds"] + parse_network(network).seconds(row["rounds"], row["online_bytes"] / 2)


def run_crypten(config: Config, journal: Journal, shape: Shape, timeout: float) -> None:
    """Decode steps on engine ``crypten``: rounds and bytes are exact; seconds are this machine's."""
    part = config.crypten
    done = {(row["length"], row["policy"]) for row in journal.of("cost") if row["engine"] == "crypten"}
    todo = [
        (length, entry.text)
        for length in part.lengths
        for entry in entries(part.policies, part.budgets, length, shape.heads)
        if (length, entry.text) not in done
    ]
    if not todo:
        return
    with PrivateLlama(*split({"engine": "crypten", "timeout": timeout})) as llama:
        for length, text in watched(todo, "crypten", "step"):
            _, plain, _ = fills(text, length)  # most steps fill no cluster; such a one is measured
            found = measured_step(llama, replace(shape, kv_len=plain, policy=text, steps=part.steps))
            journal.append({"kind": "cost", "engine": "crypten", "length": length, "policy": text, **found})


def answer_privately(config: Config, journal: Journal, heads: int, timeout: float) -> None:
    """Prompts answered on engines ``plain`` and ``wire``, greedily, and compared token by token."""
    part = config.private
    done = {(row["task"], row["length"], row["index"], row["policy"]) for row in journal.of("private")}
    policies = [entry.text for entry in entries(part.policies, (part.budget,), part.length, heads)]
    todo = [
        (task, index, text)
        for task in part.tasks
        for index in range(part.samples)
        for text in policies
        if (task, part.length, index, text) not in done
    ]
    if not todo:
        return
    settings = {"offline": config.offline, "timeout": timeout}
    model = real_model.resolved(config.model)
    tokenizer = load_tokenizer(model, config.offline)
    drawn = {task: _drawn(config, tokenizer, task, part.length, part.samples) for task in part.tasks}
    expected = {}
    with PrivateLlama.from_pretrained(model, engine="plain", **settings) as plain:
        for task, index, text in todo:
            ids = drawn[task][index].ids(tokenizer)
            expected[task, index, text] = ids, agreement.greedy(plain, ids, part.tokens, policy=text)
    with PrivateLlama.from_pretrained(model, engine="wire", **settings) as wire:
        for task, index, text in watched(todo, "private", "answer"):
            ids, answer = expected[task, index, text]
            compared = agreement.compare(answer, agreement.greedy(wire, ids, part.tokens, policy=text), False)
            where = {"kind": "private", "task": task, "index": index, "length": part.length, "policy": text}
            journal.append(where | compared)
