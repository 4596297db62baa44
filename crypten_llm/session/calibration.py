"""What the owner measures on its model, in the clear and alone, before it shares the weights.

Owns the measurement and the public scales that follow from it. Secure functions hold on a domain, and a model may
leave it: CrypTen's inverse square root is good to 1 % on [0.1, 150] only, while a Llama's mean square ranges from 1e-4
(a fresh embedding) to thousands. So the owner runs its own model on random tokens. Engine ``crypten`` then publishes
one power of four per RMSNorm, about the size of the hidden states there; engine ``wire`` publishes nothing and refuses
a model that leaves its domain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.models.llama import Llama

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig
    from eviction.operations import Handle


ROWS = 128
TARGET = 2.7  # the middle of [0.043, 173] on a logarithmic scale


@dataclass
class Ranges:
    """Extremes over random tokens. mean_square: (low, high) at each norm's input, by the name of its weight.

    limited: (low, high) of what engine ``wire`` limits, in all layers, by the operation
    (``engines.wire.engine.domains``).
    """

    mean_square: dict[str, tuple[float, float]]
    limited: dict[str, tuple[float, float]]

    def norm_scales(self) -> dict[str, float]:
        """A power of four for each norm weight's name, such that scale * mean(x^2) is near ``TARGET``."""
        return {name: _scale(*range) for name, range in self.mean_square.items()}


class _Recorder(PlainEngine):
    """The plain engine, noting ranges as it goes."""

    def __init__(self, growth: float) -> None:
        """growth: how many times longer than what is run a row of scores may become."""
        super().__init__()
        self.growth = growth
        self.mean_square: dict[int, tuple[float, float]] = {}
        self.limited: dict[str, tuple[float, float]] = {}

    def _note(self, operation: str, seen: torch.Tensor) -> None:
        low, high = self.limited.get(operation, (math.inf, -math.inf))
        self.limited[operation] = min(low, seen.min().item()), max(high, seen.max().item())

    def rms_norm(self, x: Handle, weight: Handle, eps: float, scale: float) -> Handle:
        mean_square = x.square().mean(-1)
        self.mean_square[id(weight)] = (mean_square.min().item(), mean_square.max().item())
        self._note("rms_norm", (mean_square + eps) * x.shape[-1])
        return super().rms_norm(x, weight, eps, scale)

    def softmax(self, scores: Handle, mask: torch.Tensor | None = None) -> Handle:
        """Rows as they are, and longer: with the largest score once and as many more of all others as it is longer."""
        visible = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        largest = visible.amax(-1, keepdim=True)
        others = (visible - largest).exp().sum(-1, keepdim=True) - 1
        self._note("softmax", scores if mask is None else scores[mask.expand_as(scores)])
        for growth in (1.0, self.growth):
            self._note("softmax row", largest + (growth * others).log1p())
        return super().softmax(scores, mask)

    def mix(self, weights: Handle, values: Handle) -> Handle:
        mixed = super().mix(weights, values)
        self._note("mix", mixed)
        return mixed

    def swiglu(self, gate: Handle, up: Handle) -> Handle:
        self._note("swiglu gates", gate)
        self._note("swiglu up", up)
        return super().swiglu(gate, up)

    def residual(self, x: Handle, y: Handle) -> Handle:
        out = super().residual(x, y)
        self._note("residual", out)
        return out


@torch.no_grad()
def measure(config: LlamaConfig, weights: dict[str, torch.Tensor]) -> Ranges:
    """Ranges of the model whose ``weights`` (float, by name, prepared by ``llama.prepare``) are given.

    Random tokens stand for a prompt, drawn with a fixed seed; they are no secret, and other text may reach further.
    """
    count = min(ROWS, config.context)
    longest = max(config.context if window is None else window for window in config.windows or (None,))
    recorder = _Recorder(max(longest / count, 1.0))
    ids = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    model = Llama(recorder, config, weights)
    model(recorder.tokens(ids, len(ids), config.vocab_size), model.new_cache())
    found = {name: recorder.mean_square.get(id(weight)) for name, weight in weights.items()}
    return Ranges({name: range for name, range in found.items() if range}, recorder.limited)


def _scale(low: float, high: float) -> float:
    middle = math.sqrt(max(low, 1e-12) * max(high, 1e-12))
    return 4.0 ** round(math.log(TARGET / middle, 4))  # its root is what multiplies the hidden states
