"""Policies that look once: at the end of the prompt each row has a score, and the best rows stay.

Owns which rows compete and for how many places; a policy says how a row is scored. Most scores are products of the
cached keys with one vector or a few for each kv head. The keys are open behind their masks already, so that such a
product opens the vectors alone, however long the prompt is.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction import trained
from eviction.operations import Handle, Layer, Operations
from eviction.policy import Policy
from eviction.rows import retain
from eviction.settings import budget, fitting, tokens, whole


@dataclass(frozen=True)
class LookOnce(Policy, ABC):
    """The prompt's ``start`` first and ``recent`` last rows stay, and of those between the best; what is generated
    joins and stays. A further turn of a conversation is a prompt of its own: the rows that are there stay, and the
    choice is among those that it adds.

    budget: rows kept of the prompt, the first and the last among them.
    """

    budget: float = budget(0.5)
    start: int = whole(4, 0)
    recent: int = whole(32, 0)

    when: ClassVar[str] = "prefill"
    shared_over: ClassVar[str] = "kv head"
    goes_on: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ("top", "picks", "keep", "take")  # operations that keeping takes

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        return {
            "budget": rows,
            "start": fitting(cls.start, rows / 8),
            "recent": fitting(cls.recent, rows / 4),
            **changed,
        }

    def go_on(self, ops: Operations, layer: Layer, turn_tokens: int) -> None:
        layer.notes["held rows"], layer.notes["turn tokens"] = len(layer), turn_tokens

    def evict(self, ops: Operations, layer: Layer) -> None:
        held = layer.notes.get("held rows", 0)
        kept = tokens(self.budget, layer.notes.get("turn tokens", layer.prompt_tokens))
        if kept < len(layer) - held:
            first = held + (0 if held else min(self.start, kept))
            count = kept - (first - held)
            recent = min(self.recent, count)
            index = torch.arange(first, len(layer) - recent)
            scores = self.scores(ops, layer, index) if count > recent else None
            retain(ops, layer, scores, first, count - recent, recent)
        self.forget(layer)

    @abstractmethod
    def scores(self, ops: Operations, layer: Layer, index: torch.Tensor) -> Handle:
        """[G, n] of the rows at these public indices, int64 [n]: the higher ones stay."""

    def forget(self, layer: Layer) -> None:
        """At the end of the prompt: what was noted of its tokens has done its service."""


def along(ops: Operations, layer: Layer, index: torch.Tensor, directions: torch.Tensor) -> Handle:
    """[G, n]: the products of the keys at these indices with a public direction [G, head_dim] for each kv head."""
    return ops.scores(ops.public(directions[:, None]), ops.take(layer.keys, index))[:, 0]


def turn(layer: Layer, places: torch.Tensor) -> torch.Tensor:
    """The mean of the rotations by which attention turns queries at places int64 [P]: public, [head_dim, head_dim], for
    queries from the left."""
    cos, sin = (table.mean(0) for table in layer.rotary(places))
    half = layer.head_dim // 2
    swap = torch.zeros(layer.head_dim, layer.head_dim)  # x @ swap = (-right half, left half)
    swap[half:, :half] = -torch.eye(half)
    swap[:half, half:] = torch.eye(half)
    return torch.diag(cos) + swap * sin


def for_heads(policy: Policy, weights: str, name: str, layer: Layer, option: str) -> torch.Tensor:
    """What a file's ``name`` [layers, kv_heads, n] has for the kv heads of this layer: [G, n].

    option: of ``crypten_llm calibrate``, which writes such files. Raises PolicyError for a file of another model.
    """
    found = trained.load(weights, policy.name).get(name)
    own = torch.tensor(layer.which or range(layer.kv_heads))
    heads = int(own.max()) + 1 if layer.which else layer.kv_heads  # of the model, or that there are at least
    shape = () if found is None else tuple(found.shape)
    expected = (layer.layers, max(heads, shape[1]) if layer.which and len(shape) == 3 else heads, layer.head_dim)
    if found is None or shape != expected:
        raise policy.refuse(
            f"its weights are for another model: {name} is {shape or 'missing'}, not {expected}; write them for this "
            f"model (python -m crypten_llm calibrate {option} FILE)"
        )
    return found[layer.index, own]
