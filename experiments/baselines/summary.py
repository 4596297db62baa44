"""What the cells of ``compare_baselines`` come to: means with their intervals, beside what they cost.

Owns the statistics. An interval is of 95 %: Wilson's for a share of right answers, a bootstrap over prompts for all
else. Policies are compared on the same prompts, so differences to ``full`` are resampled in pairs; they are far
narrower than the intervals of the two means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from eviction import FULL
from experiments.baselines.cells import Entry, ablation, entries
from experiments.baselines.config import Config
from experiments.tasks import TASKS
from experiments.tools.intervals import Interval, bootstrap, of_task
from experiments.tools.journal import Journal


@dataclass
class Result:
    """A policy at a budget and length (``None``: all).

    tasks: of each task that is scored. mean, difference: over these, and to ``full``; ``None`` without them. losses: of
    each task of texts. kept, attended: shares of rows, ``None`` where not measured. cost: its cells, by engine.
    """

    entry: Entry
    length: int | None
    tasks: dict[str, Interval] = field(default_factory=dict)
    losses: dict[str, Interval] = field(default_factory=dict)
    mean: Interval | None = None
    difference: Interval | None = None
    kept: float | None = None
    attended: float | None = None
    cost: dict[str, dict] = field(default_factory=dict)


class Summary:
    """Of what ``journal`` holds so far; ``policies`` and ``ablation`` have a ``Result`` for each of their rows, and
    ``over_lengths`` one for each policy and budget, over all lengths. A length that is not done is left out, if there
    is one that is; ``config`` has those that are in.
    """

    def __init__(self, config: Config, journal: Journal, heads: int):
        self._scores, self._shares = _gather(config, journal)
        config = _of_lengths(config, [length for length in config.lengths if self._is_done(config, length)])
        self.config, self.private = config, journal.of("private")
        self._costs = {(row["engine"], row["length"], row["policy"]): row for row in journal.of("cost")}
        lists = {length: entries(config.policies, config.budgets, length, heads) for length in config.lengths}
        self.policies = [self._result(entry, length) for length, rows in lists.items() for entry in rows]
        self.ablation = [
            self._result(entry, length) for length in config.lengths for entry in ablation(config, length, heads)
        ]
        joined = list(zip(*lists.values(), strict=True))
        self._of_all = {(rows[0].name, rows[0].budget): self._all_scores(rows) for rows in joined}
        self.over_lengths = [self._joined(rows[0]) for rows in joined]

    def beside(self, name: str, other: str, budget: float) -> Interval | None:
        """By how much a policy's mean over tasks and lengths lies above another's, on the same prompts."""
        mine, theirs = (self._at(policy, budget) for policy in (name, other))
        return _difference(mine, theirs)

    def _at(self, name: str, budget: float | None) -> dict:
        return self._of_all.get((name, budget)) or self._of_all.get((name, None), {})

    def _is_done(self, config: Config, length: int) -> bool:
        found = self._scores.get((length, FULL.name), {})
        return all(task in found for task in config.tasks if not _is_text(task))

    def _result(self, entry: Entry, length: int) -> Result:
        mine, full = (self._scores.get((length, text), {}) for text in (entry.text, FULL.name))
        result = _compared(entry, length, mine, full)
        known = self._shares.get((length, entry.text))
        if known:
            result.kept, result.attended = (float(np.mean(column)) for column in zip(*known, strict=True))
        keys = {engine: (engine, length, entry.text) for engine in ("wire", "crypten")}
        result.cost = {engine: self._costs[key] for engine, key in keys.items() if key in self._costs}
        return result

    def _joined(self, entry: Entry) -> Result:
        return _compared(entry, None, self._at(entry.name, entry.budget), self._at(FULL.name, None))

    def _all_scores(self, rows: Sequence[Entry]) -> dict:
        """By task and length, of one policy and budget at all lengths, whose texts may differ."""
        return {
            f"{task}, {length}": scores
            for length, entry in zip(self.config.lengths, rows, strict=True)
            for task, scores in self._scores.get((length, entry.text), {}).items()
            if not _is_text(task)
        }


def _of_lengths(config: Config, lengths: list[int]) -> Config:
    if not lengths:
        return config
    ablation = replace(config.ablation, lengths=tuple(n for n in config.ablation.lengths if n in lengths))
    return replace(config, lengths=tuple(lengths), ablation=ablation)


def _compared(entry: Entry, length: int | None, mine: dict, full: dict) -> Result:
    """mine, full: scores by task."""
    result = Result(entry, length)
    result.losses = {task: bootstrap([scores]) for task, scores in mine.items() if _is_text(task)}
    scored = [task for task in mine if not _is_text(task)]
    result.tasks = {task: of_task(mine[task]) for task in scored}
    if scored:
        result.mean = bootstrap([mine[task] for task in scored])
        result.difference = _difference({task: mine[task] for task in scored}, full)
    return result


def _difference(mine: dict, theirs: dict) -> Interval | None:
    """Of the means over tasks; ``None`` where they are not of the same prompts."""
    if mine and all(len(theirs.get(task, ())) == len(scores) for task, scores in mine.items()):
        return bootstrap(list(mine.values()), [theirs[task] for task in mine])
    return None


def _is_text(task: str) -> bool:
    return task in TASKS and TASKS[task].metric == "perplexity"


def _gather(config: Config, journal: Journal) -> tuple[dict, dict]:
    """Scores by (length, policy) and task, in the order of the examples; (kept, attended) of each cell."""
    cells = {
        (row["first"], row["task"], row["length"], policy): cell  # of a block that has grown since, the last
        for row in journal.of("accuracy")
        for policy, cell in row["policies"].items()
        if row["task"] in config.tasks and row["first"] < config.count(row["task"], row["length"])
    }
    scores, shares = {}, {}
    for (_, task, length, policy), cell in sorted(cells.items(), key=lambda item: item[0][0]):
        scores.setdefault((length, policy), {}).setdefault(task, []).extend(cell["scores"])
        if cell["kept"] is not None:
            shares.setdefault((length, policy), []).append((cell["kept"], cell["attended"]))
    return scores, shares
