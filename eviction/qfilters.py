"""Policy ``qfilters``: queries of a head point in one direction more than in others; keys that lie along it stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from eviction import trained
from eviction.look_once import LookOnce, along, for_heads
from eviction.operations import Handle, Layer, Operations


@dataclass(frozen=True)
class QFilters(LookOnce):
    """A row's score is its key times the first singular vector of the queries of its kv head, turned so that the
    queries' mean lies on its positive side.

    weights: where these filters are: ``shipped``, ``SmolLM2-135M-Instruct``, or the name of registered ones. A file
    holds ``filters`` [layers, kv_heads, head_dim]; ``crypten_llm calibrate --filters-out`` writes one. They are
    public, head_dim numbers a kv head.

    Source: Godey et al. 2025, section 3; filters after the rotary embedding, the mean of those of a group's heads, as
    in the authors' code. Deviations: rows are dropped after the prompt alone; its first rows stay.
    """

    weights: str = trained.weights("SmolLM2-135M-Instruct")

    name: ClassVar[str] = "qfilters"
    paper: ClassVar[str] = "Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression"
    arxiv: ClassVar[str] = "2503.02812"
    reveals: ClassVar[str] = "nothing; the filters are public"
    cost: ClassVar[str] = "none after the prefill"
    style: ClassVar[tuple[str, str, str]] = ("#009E73", "<", ":")
    uses: ClassVar[tuple[str, ...]] = ("public", "scores", *LookOnce.keeps)

    def begin(self, ops: Operations, layer: Layer) -> None:
        self._filters(layer)

    def watches(self, prompt_tokens: int) -> int:
        return 0  # keys alone

    def scores(self, ops: Operations, layer: Layer, index: torch.Tensor) -> Handle:
        return along(ops, layer, index, self._filters(layer))

    def _filters(self, layer: Layer) -> torch.Tensor:
        return for_heads(self, self.weights, "filters", layer, "--filters-out")
