"""Policy ``expected_attention``: what the prompt's mean query will look at, seen from the places of the answer."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from eviction.look_once import LookOnce, turn
from eviction.operations import Handle, Layer, Operations, Seen
from eviction.rows import spread
from eviction.settings import whole


@dataclass(frozen=True)
class ExpectedAttention(LookOnce):
    """A row's score is the attention that it would draw from the mean of the prompt's queries, the ``start`` first
    tokens' left out, turned as the rotary embedding turns the next ``future`` places on average; the mean over the
    query heads of a kv head.

    Source: Devoto et al. 2025, section 3, with the mean of the queries alone: neither their covariance nor the norm of
    the values counts. Further deviations: the last rows stay; rows are dropped after the prompt alone.
    """

    future: int = whole(512, 1, 2**16)

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = (
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution"
    )
    arxiv: ClassVar[str] = "2510.00636"
    cost: ClassVar[str] = "none after the prefill"
    style: ClassVar[tuple[str, str, str]] = ("#009E73", ">", ":")
    uses: ClassVar[tuple[str, ...]] = (
        "total",
        "transform",
        "mass",
        "within",
        "scores",
        "softmax",
        "mix",
        *LookOnce.keeps,
    )

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        rows, last = seen.key_before.shape[1], int(seen.positions[-1])
        first = self.start if layer.prompt_tokens > self.start else 0
        counted = torch.arange(last + 1 - rows, last + 1) >= first
        if not counted.any():
            return
        query = seen.query_before.reshape(layer.kv_heads, layer.group, rows, layer.head_dim)[:, :, counted]
        total, more = ops.total(query, 2), int(counted.sum())
        before, count = layer.notes.get("queries", (None, 0))
        layer.notes["queries"] = (total if before is None else ops.add(before, total)), count + more

    def scores(self, ops: Operations, layer: Layer, index: torch.Tensor) -> Handle:
        total, count = layer.notes["queries"]
        places = torch.arange(layer.prompt_tokens, layer.prompt_tokens + self.future)
        query = ops.transform(total, turn(layer, places) / count)  # [G, group, head_dim]
        weights = ops.softmax(ops.scores(query, ops.take(layer.keys, index)))
        ops.mix(weights, ops.take(layer.values, index))  # which leaves the weights as ``mass`` reads them
        return ops.within(ops.mass(weights, spread(layer, torch.ones(1))), 1.0)

    def forget(self, layer: Layer) -> None:
        layer.notes.pop("queries", None)
