"""Policy ``h2o``: the rows that drew most attention so far, and the recent ones."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction.operations import Layer, Operations, Seen
from eviction.policy import Policy
from eviction.rows import add_mass, drop_lowest, retain, spread
from eviction.settings import budget, tokens


@dataclass(frozen=True)
class H2O(Policy):
    """Heavy hitters. A row's score is the sum of the attention weights that all queries so far gave it.

    heavy: rows kept by score. recent: last rows, kept always.

    Source: Zhang et al. 2023, algorithm 1. Deviations: one choice per kv head, scores averaged over its query heads
    (the paper's models have one query head each); the prompt's rows are evicted once, at its end.
    """

    heavy: float = budget(0.1)
    recent: float = budget(0.1)

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models"
    arxiv: ClassVar[str] = "2306.14048"
    when: ClassVar[str] = "prefill and step"
    shared_over: ClassVar[str] = "kv head"
    cost: ClassVar[str] = "one minimum over the heavy rows, one oblivious removal"
    style: ClassVar[tuple[str, str, str]] = ("#E69F00", "P", "-")
    uses: ClassVar[tuple[str, ...]] = (
        *("mass", "top", "picks", "keep", "take"),
        *("gather", "drop", "transform", "choose", "scale", "within"),
    )

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        return {"heavy": rows // 2, "recent": rows - rows // 2, **changed}  # as in the paper, half and half

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        mass = ops.mass(seen.weights, spread(layer, torch.ones(len(seen.positions))))
        add_mass(ops, layer.notes, mass, limit=int(seen.positions[-1]) + 1)

    def evict(self, ops: Operations, layer: Layer) -> None:
        heavy, recent = self._sizes(layer)
        if len(layer) > heavy + recent:
            older = layer.notes["mass"][..., : len(layer) - recent]
            retain(ops, layer, older, 0, heavy, recent, ("mass",))

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        self.watch(ops, layer, seen)
        heavy, recent = self._sizes(layer)
        if len(layer) > heavy + recent:
            drop_lowest(ops, layer, layer.notes["mass"][..., : len(layer) - recent], ("mass",))

    def _sizes(self, layer: Layer) -> tuple[int, int]:
        return tokens(self.heavy, layer.prompt_tokens), tokens(self.recent, layer.prompt_tokens)
