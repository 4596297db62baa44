"""Policy ``locret``: a small trained network says how much a token will matter, as soon as it has been read."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction import trained
from eviction.operations import Layer, Operations, Seen
from eviction.policy import Policy
from eviction.rows import note_more, retain
from eviction.settings import budget, fitting, tokens, whole


@dataclass(frozen=True)
class Locret(Policy):
    """Retaining heads. After each piece of the prompt the cache is cut down to the rows of the highest scores, so that
    it is never larger than ``budget`` and a piece; the last ``recent`` rows are kept until the next piece comes.

    A token's score, one per kv head, is W2 silu(W1 [q, k, v]) of its queries, keys and values, and does not change.
    weights: ``shipped``, or the name of registered ones (``trained.register``). Neither silu nor a score sees numbers
    beyond 12.

    Source: Huang et al. 2024, section 3. Deviations: queries and keys are taken before the rotary embedding, so that a
    score does not depend on the position; the width is that of the file (1,024 in the paper).
    """

    budget: float = budget(6000)
    recent: int = whole(100, 0)
    weights: str = trained.weights()

    name: ClassVar[str] = "locret"
    paper: ClassVar[str] = "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads"
    arxiv: ClassVar[str] = "2410.01805"
    when: ClassVar[str] = "each piece of the prompt"
    shared_over: ClassVar[str] = "kv head"
    cuts_prompts: ClassVar[bool] = True
    cost: ClassVar[str] = "none after the prefill"
    style: ClassVar[tuple[str, str, str]] = ("#CC79A7", "h", "-")
    uses: ClassVar[tuple[str, ...]] = (*("transform", "multiply", "sigmoid", "top", "picks", "keep", "take", "gather"),)

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        return {"budget": rows, "recent": fitting(cls.recent, rows / 4), **changed}

    def begin(self, ops: Operations, layer: Layer) -> None:
        first, second = self._matrices(layer)
        if second.shape[0] != first.shape[1]:
            raise self.refuse(f"W1 gives {first.shape[1]} numbers and W2 takes {second.shape[0]}; train it again")

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        first, second = self._matrices(layer)
        hidden = ops.transform(trained.features(ops, layer, seen), first)
        score = ops.transform(ops.multiply(hidden, ops.sigmoid(hidden)), second).permute(1, 0)
        score = ops.sigmoid(score)  # the same order, in a known range: comparisons are as fine as the range is small
        note_more(ops, layer, "score", score, -1)
        self._cut(ops, layer, self.recent if seen.positions[-1] < layer.prompt_tokens - 1 else 0)

    def _cut(self, ops: Operations, layer: Layer, recent: int) -> None:
        kept = tokens(self.budget, layer.prompt_tokens)
        if len(layer) <= kept:
            return
        recent = min(recent, kept)
        score = layer.notes["score"][..., : len(layer) - recent]
        retain(ops, layer, score, 0, kept - recent, recent, ("score",))

    def _matrices(self, layer: Layer) -> tuple[torch.Tensor, ...]:
        weights = trained.load(self.weights, self.name)
        first = trained.matrix(weights, "w1", layer, trained.width(layer), None, self.name)
        return first, trained.matrix(weights, "w2", layer, first.shape[1], layer.kv_heads, self.name)
