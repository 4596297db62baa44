"""What has been measured: scores of policies on prompts, and what their decode steps cost. Nothing is measured twice.

Owns the rows of one file per folder; a row is written when its measurement is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.tasks import Example
from experiments.tools.journal import Journal

SCORES, COST = "scores", "cost"


def name_of(example: Example, length: int) -> str:
    """A prompt's name: its task and length for people, and a digest of all that its score depends on."""
    parts = [example.task, example.prompt, example.answers, example.max_new_tokens, example.classes]
    if example.rendered:  # scores of others keep the names under which they are stored
        parts.append("rendered")
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return f"{example.task}/{length}/{digest}"


class Measured:
    """The file of a folder. model: that all of it was measured on.

    Raises UsageError for a file of another model.
    """

    def __init__(self, path: Path, model: str):
        self._journal = Journal(path, {"model": model})
        self._scores: dict[str, dict[str, float]] = {}
        self._costs: dict[tuple[str, int], dict] = {}
        for row in self._journal.of(SCORES):
            self._scores.setdefault(row["prompt"], {}).update(row["scores"])
        for row in self._journal.of(COST):
            self._costs[row["policy"], row["tokens"]] = row["figures"]

    def score(self, prompt: str, policy: str) -> float | None:
        return self._scores.get(prompt, {}).get(policy)

    def scores(self, policy: str, prompts: Sequence[str]) -> list[float] | None:
        """Of all the prompts; ``None`` while one is missing."""
        found = [self.score(prompt, policy) for prompt in prompts]
        return None if None in found else found

    def add_scores(self, prompt: str, scores: dict[str, float]) -> None:
        self._scores.setdefault(prompt, {}).update(scores)
        self._journal.append({"kind": SCORES, "prompt": prompt, "scores": scores})

    def cost(self, policy: str, tokens: int) -> dict | None:
        return self._costs.get((policy, tokens))

    def add_cost(self, policy: str, tokens: int, figures: dict) -> None:
        self._costs[policy, tokens] = figures
        self._journal.append({"kind": COST, "policy": policy, "tokens": tokens, "figures": figures})
