"""Measurements that a search asks for: scores of policies on prompts, short prompts first, and what a step costs.

Owns the prompts, and the way from a policy's text to figures; what has been measured comes from the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tqdm import tqdm

import eviction
from crypten_llm.errors import UsageError
from crypten_llm.models.checkpoint import load_tokenizer
from experiments.measure.eviction_counts import count, shape_of
from experiments.measure.quality import Evaluator, draw
from experiments.tasks import Example, find
from experiments.tuning.store import Measured, name_of

FULL = eviction.FULL.name
FIRST_LOOK = 4  # a length's first rung has one in so many of its prompts


@dataclass(frozen=True)
class Prompt:
    """An example and its name in the store."""

    name: str
    example: Example


@dataclass(frozen=True)
class Prompts:
    """rungs: what the search looks at, in this order. fresh: what it never sees."""

    rungs: tuple[tuple[Prompt, ...], ...]
    fresh: tuple[Prompt, ...]

    @property
    def searched(self) -> tuple[Prompt, ...]:
        return tuple(prompt for rung in self.rungs for prompt in rung)


def draw_prompts(
    model: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    fresh: int,
    seed: int,
    data: str | None = None,
    offline: bool = False,
) -> Prompts:
    """Prompts of each task and length, ``samples`` for the search and ``fresh`` beside them.

    Rungs go from short prompts to long ones; of each length a few prompts of every task come first.

    Raises UsageError for a task that has no score in [0, 1], or too few examples.
    """
    tokenizer, rungs, unseen = load_tokenizer(model, offline), [], []
    for length in sorted(lengths):
        first, then = [], []
        for name in tasks:
            if find(name, data, offline).metric == "perplexity":
                raise UsageError(f"task {name} has a loss and no score between 0 and 1; leave it out of --tasks")
            found = draw(name, tokenizer, length, samples + fresh, seed, data, offline)
            prompts = [Prompt(name_of(example, length), example) for example in found]
            look = -(-samples // FIRST_LOOK)
            first, then, unseen = first + prompts[:look], then + prompts[look:samples], unseen + prompts[samples:]
        rungs += [tuple(rung) for rung in (first, then) if rung]
    return Prompts(tuple(rungs), tuple(unseen))


class Bench:
    """Scores and costs of policies, each measured once; a with block, which ends the processes.

    tokens: length of the prompt after which a decode step is counted. workers, offline: as for ``Evaluator``.
    """

    def __init__(self, store: Measured, model: str, tokens: int, workers: int, offline: bool = False):
        self.store, self.tokens = store, tokens
        self._model, self._workers, self._offline = model, workers, offline
        self._shape = shape_of(model, tokens, offline)
        self._open, self._evaluator = ExitStack(), None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._open.close()

    def scores(self, prompts: Sequence[Prompt], policies: Sequence[str]) -> None:
        """Sees to it that the store has the scores of all these policies on all these prompts."""
        missing: dict[tuple[str, ...], list[Prompt]] = {}
        for prompt in prompts:
            lacking = tuple(policy for policy in policies if self.store.score(prompt.name, policy) is None)
            if lacking:
                missing.setdefault(lacking, []).append(prompt)
        total = sum(len(lacking) * len(found) for lacking, found in missing.items())
        with tqdm(total=total, unit="answer", leave=False, disable=None if total else True) as progress:
            for lacking, found in missing.items():
                rows = self._rows(found, lacking)
                for prompt in found:
                    self.store.add_scores(prompt.name, {policy: next(rows)["score"] for policy in lacking})
                    progress.update(len(lacking))

    def _rows(self, prompts: Sequence[Prompt], policies: Sequence[str]) -> Iterator[dict]:
        if self._evaluator is None:
            self._evaluator = self._open.enter_context(Evaluator(self._model, self._workers, offline=self._offline))
        return iter(self._evaluator.rows([prompt.example for prompt in prompts], policies))

    def counts(self, policy: str) -> dict:
        """Of a decode step: attention's online and dealer bytes on all links, and rounds; seconds of all layers."""
        found = self.store.cost(policy, self.tokens)
        if found is None:
            step = count(replace(self._shape, policy=policy))
            found = {what: float(step.total(what)) for what in ("online", "dealer", "rounds")}
            found |= {network: step.seconds(network) for network in ("lan", "wan")}
            self.store.add_cost(policy, self.tokens, found)
        return found

    def cost(self, policy: str) -> dict[str, float]:
        """By the names in ``goal.COSTS``."""
        found, full = self.counts(policy), self.counts(FULL)
        share = (found["online"] + found["dealer"]) / (full["online"] + full["dealer"])
        return {"bytes": share, "lan": found["lan"], "wan": found["wan"]}
