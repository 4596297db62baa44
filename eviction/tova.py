"""Policy ``tova``: at each step the row that the last query looked at least goes."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction.operations import Layer, Operations, Seen
from eviction.policy import Policy
from eviction.rows import drop_lowest, over_heads, retain, spread
from eviction.settings import budget, tokens


@dataclass(frozen=True)
class TOVA(Policy):
    """Token omission via attention. All heads of a layer keep the same rows; no row is kept for its place.

    size: rows to keep.

    Source: Oren et al. 2024, section 4.2. Deviation: the prompt's rows are evicted once, by its last query, as the
    authors' code does when a prompt comes in one piece.
    """

    size: float = budget(512)

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "Transformers are Multi-State RNNs"
    arxiv: ClassVar[str] = "2401.06104"
    when: ClassVar[str] = "prefill and step"
    shared_over: ClassVar[str] = "layer"
    cost: ClassVar[str] = "one minimum over the cache per layer, one oblivious removal"
    style: ClassVar[tuple[str, str, str]] = ("#E69F00", "X", "--")
    uses: ClassVar[tuple[str, ...]] = ("mass", "total", "scale", "top", "picks", "keep", "take", "drop")

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        return {"size": rows, **changed}

    def watches(self, prompt_tokens: int) -> int:
        return 1

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        last = seen.positions == layer.prompt_tokens - 1
        if last.any():
            layer.notes["mass"] = over_heads(ops, ops.mass(seen.weights, spread(layer, last)))

    def evict(self, ops: Operations, layer: Layer) -> None:
        size, mass = tokens(self.size, layer.prompt_tokens), layer.notes.pop("mass")
        if len(layer) > size:
            retain(ops, layer, mass, 0, size, 0)

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        if len(layer) > tokens(self.size, layer.prompt_tokens):
            mass = over_heads(ops, ops.mass(seen.weights, spread(layer, torch.ones(1))))
            drop_lowest(ops, layer, mass)
