"""Policy ``kvzap_linear``: a linear map of a token, fitted to what a repetition of the text would look at."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from eviction import trained
from eviction.look_once import LookOnce
from eviction.operations import Handle, Layer, Operations, Seen
from eviction.rows import note_more

LARGEST = 2.0**6  # of a score; its file is written so that those of the prompts that it was fitted to are below a tenth


@dataclass(frozen=True)
class KVzapLinear(LookOnce):
    """A row's score is a fixed linear map of the token's queries, keys and values before the rotary embedding, one for
    each kv head.

    weights: where the maps are: ``shipped``, ``SmolLM2-135M-Instruct``, or the name of registered ones. A file holds
    ``layers.N.scores`` [features, kv_heads]; ``crypten_llm calibrate --scores-out`` writes one. They are public. Scores
    are below 64.

    Source: Jegou and Jeblick 2026, section 3, the linear variant. Deviations: a public count of rows stays for each kv
    head, where the paper keeps those whose score is above a threshold; the map is of the layer's queries, keys and
    values, linear images of the hidden state that the paper takes; the attention that it is fitted to is weighted by
    the values' part in the output, and not divided by the length of the hidden state that looks; rows are dropped after
    the prompt alone.
    """

    weights: str = trained.weights("SmolLM2-135M-Instruct")

    name: ClassVar[str] = "kvzap_linear"
    paper: ClassVar[str] = "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning"
    arxiv: ClassVar[str] = "2601.07891"
    reveals: ClassVar[str] = "nothing; the maps are public"
    cost: ClassVar[str] = "none after the prefill"
    style: ClassVar[tuple[str, str, str]] = ("#CC79A7", "^", ":")
    uses: ClassVar[tuple[str, ...]] = ("transform", "within", *LookOnce.keeps)

    def begin(self, ops: Operations, layer: Layer) -> None:
        self._map(layer)

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        score = ops.transform(trained.features(ops, layer, seen), self._map(layer)).permute(1, 0)
        note_more(ops, layer, "score", ops.within(score, LARGEST), -1)

    def scores(self, ops: Operations, layer: Layer, index: torch.Tensor) -> Handle:
        return layer.notes["score"][:, index - layer.notes.get("held rows", 0)]

    def forget(self, layer: Layer) -> None:
        layer.notes.pop("score", None)

    def _map(self, layer: Layer) -> torch.Tensor:
        weights = trained.load(self.weights, self.name)
        sizes = trained.width(layer), layer.kv_heads
        return trained.matrix(weights, "scores", layer, *sizes, self.name, "crypten_llm calibrate --scores-out FILE")
