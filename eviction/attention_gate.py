"""Policy ``attention_gate``: a small trained attention over the prompt says which tokens each head may forget."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from eviction import trained
from eviction.operations import Handle, Layer, Operations, Seen
from eviction.policy import Policy
from eviction.rows import note_more, retain
from eviction.settings import budget, tokens

LARGEST = 2.0**6  # of the gate's queries, keys and values


@dataclass(frozen=True)
class AttentionGate(Policy):
    """Each token attends, with queries, keys and values of its own of a few dimensions, to what came before; the result
    times a matrix is the gate's logit for each kv head. At the end of the prompt the rows of the highest stay.

    budget: rows to keep. weights: ``shipped``, or the name of registered ones (``trained.register``). The gate's
    queries, keys and values are below 64.

    Source: Zeng et al. 2024, section 3. Deviations: a public count of rows is kept, where the paper keeps those whose
    gate is above 1/2; the gate sees the layer's queries, keys and values before the rotary embedding, linear images of
    the hidden state that the paper uses; it has one head; it is trained on the answers' attention, not through the
    model.
    """

    budget: float = budget(0.5)
    weights: str = trained.weights()

    name: ClassVar[str] = "attention_gate"
    paper: ClassVar[str] = "In-context KV-Cache Eviction for LLMs via Attention-Gate"
    arxiv: ClassVar[str] = "2410.12876"
    when: ClassVar[str] = "prefill"
    shared_over: ClassVar[str] = "kv head"
    cost: ClassVar[str] = "none after the prefill, which computes one more small attention per layer"
    style: ClassVar[tuple[str, str, str]] = ("#CC79A7", "p", "--")
    uses: ClassVar[tuple[str, ...]] = (
        *("transform", "within", "fixed", "sigmoid", "softmax", "mix"),
        *("top", "picks", "keep", "take"),
    )

    def begin(self, ops: Operations, layer: Layer) -> None:
        self._matrices(layer)

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        of_query, of_key, of_value, gate = self._matrices(layer)
        x, of_query = trained.features(ops, layer, seen), of_query / math.log(ops.softmax_base)  # trained for base e
        parts = (ops.within(ops.transform(x, part), LARGEST) for part in (of_query, of_key, of_value))
        query, key, value = map(self._one_head, parts)
        note_more(ops, layer, "gate keys", ops.fixed(key), 1)
        note_more(ops, layer, "gate values", ops.fixed(value, values=True), 1)
        count, length = query.shape[1], layer.notes["gate keys"].shape[1]
        mask = None if count == 1 else torch.ones(count, length, dtype=torch.bool).tril(length - count)
        weights = ops.softmax(ops.scores(query, layer.notes["gate keys"]), mask)
        mixed = ops.mix(weights, layer.notes["gate values"]).reshape(count, key.shape[2])
        note_more(ops, layer, "gate", ops.sigmoid(ops.transform(mixed, gate).permute(1, 0)), -1)

    def evict(self, ops: Operations, layer: Layer) -> None:
        kept, gate = tokens(self.budget, layer.prompt_tokens), layer.notes.pop("gate")
        if kept < len(layer):
            retain(ops, layer, gate[..., :-1], 0, kept - 1, 1)

    def _one_head(self, x: Handle) -> Handle:
        return x.reshape(1, *x.shape)

    def _matrices(self, layer: Layer) -> tuple[torch.Tensor, ...]:
        weights, width = trained.load(self.weights, self.name), trained.width(layer)
        query = trained.matrix(weights, "query", layer, width, None, self.name)
        size = query.shape[1]
        key, value = (trained.matrix(weights, name, layer, width, size, self.name) for name in ("key", "value"))
        return query, key, value, trained.matrix(weights, "gate", layer, size, layer.kv_heads, self.name)
