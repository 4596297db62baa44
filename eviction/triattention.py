"""Policy ``triattention``: what the queries of a head on average look at, seen from distances near and far."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from eviction import trained
from eviction.look_once import LookOnce, along, for_heads, turn
from eviction.operations import Handle, Layer, Operations
from eviction.settings import whole


@dataclass(frozen=True)
class TriAttention(LookOnce):
    """A row's score is its key times the center of the queries of its kv head, their mean before the rotary embedding,
    turned as this turns it 1, 2, 4 and so on to ``farthest`` places behind the prompt, on average.

    weights: where the centers are: ``shipped``, ``SmolLM2-135M-Instruct``, or the name of registered ones. A file holds
    ``centers`` [layers, kv_heads, head_dim]; ``crypten_llm calibrate --centers-out`` writes one. They are public,
    head_dim numbers a kv head.

    Source: Mao et al. 2026, section 4: the trigonometric score alone, which is linear in the key. Deviations: the score
    of the keys' norms is left out; query heads of a group have one center, their mean, where the paper takes the
    largest of their scores; rows are dropped after the prompt alone, and are the prompt's, where the paper drops those
    of a long answer.
    """

    farthest: int = whole(2**16, 1, 2**16)
    weights: str = trained.weights("SmolLM2-135M-Instruct")

    name: ClassVar[str] = "triattention"
    paper: ClassVar[str] = "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression"
    arxiv: ClassVar[str] = "2604.04921"
    reveals: ClassVar[str] = "nothing; the centers are public"
    cost: ClassVar[str] = "none after the prefill"
    style: ClassVar[tuple[str, str, str]] = ("#009E73", "v", ":")
    uses: ClassVar[tuple[str, ...]] = ("public", "scores", *LookOnce.keeps)

    def begin(self, ops: Operations, layer: Layer) -> None:
        self._centers(layer)

    def watches(self, prompt_tokens: int) -> int:
        return 0  # keys alone

    def scores(self, ops: Operations, layer: Layer, index: torch.Tensor) -> Handle:
        ahead = 2 ** torch.arange(self.farthest.bit_length())
        places = layer.prompt_tokens - 1 + ahead
        return along(ops, layer, index, self._centers(layer) @ turn(layer, places))

    def _centers(self, layer: Layer) -> torch.Tensor:
        return for_heads(self, self.weights, "centers", layer, "--centers-out")
