"""Policy ``random``: the control. A policy that does not beat it has learned nothing from attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from eviction.operations import Layer, Operations
from eviction.policy import Policy
from eviction.rows import take
from eviction.settings import budget, tokens, whole


@dataclass(frozen=True)
class Random(Policy):
    """Keeps a public pseudo-random choice of the prompt's rows, another in each layer, and the last row.

    budget: rows to keep. seed: of the choice, which everybody can repeat; it hides nothing.
    """

    budget: float = budget(0.5)
    seed: int = whole(0, 0)

    name: ClassVar[str] = "random"
    when: ClassVar[str] = "prefill"
    shared_over: ClassVar[str] = "layer"
    cost: ClassVar[str] = "none: public indices"
    held: ClassVar[dict] = {"seed": None}  # nothing to choose by
    style: ClassVar[tuple[str, str, str]] = ("#999999", "x", "--")
    uses: ClassVar[tuple[str, ...]] = ("take",)

    def watches(self, prompt_tokens: int) -> int:
        return 0

    def evict(self, ops: Operations, layer: Layer) -> None:
        rows, count = len(layer), tokens(self.budget, layer.prompt_tokens)
        if count >= rows:
            return
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + layer.index)
        chosen = torch.randperm(rows - 1, generator=generator)[: count - 1].sort().values
        take(ops, layer, torch.cat([chosen, torch.tensor([rows - 1])]))
