"""What the owner measures on its model, in the clear and alone, before it shares the weights.

Owns the measurement. Secure functions hold on a range, and a model may leave it: CrypTen's inverse square root is good
to 1 % on [0.1, 150] only, while a Llama's mean square ranges from 1e-4 (a fresh embedding) to a million. So the owner
runs its own model, on text and on random tokens, and notes how far its numbers go. What follows from that is the
engine's (``Engine.calibrate``): engine ``crypten`` publishes one power of four per RMSNorm, about the size of the
hidden states there, and both engines say which of their ranges a model leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.models.family import EMBEDDING, HEAD
from crypten_llm.models.llama import Llama
from crypten_llm.protocols.products import row_lengths

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig
    from eviction.operations import Handle


Range = tuple[float, float]

PROSE = Path(__file__).with_suffix(".txt")
"""A few thousand tokens of English, written for this."""

RANDOM, TEXT = "random tokens", "tokens of text"
ROWS = 128  # random tokens, and the least of text; also a pass's
MOST = 512  # tokens of ``PROSE``; of a text that the owner chose, all
WORK = 7e10  # multiplications for tokens of ``PROSE``: 512 of a model of 135 million parameters, seconds on a core


@dataclass
class Ranges:
    """How far a model's numbers go.

    mean_square: (low, high) of the mean of x^2 + eps at each norm's input, by the name of the norm's weight.
    limited: (low, high) over all layers, by what was measured: the engines pick what they limit (``_Recorder``).
    proved: by the name of a linear layer behind a norm, such as "gate_proj", what no element of its result is larger
    than, for any prompt; of "embed_tokens" the largest entry. tokens: how many were measured, by kind.
    """

    mean_square: dict[str, Range]
    limited: dict[str, Range]
    proved: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


class _Recorder(PlainEngine):
    """The plain engine, noting ranges as it goes.

    growth: how many times longer than what is run a row of scores may become. beat: called now and then.
    """

    def __init__(self, growth: float = 1.0, beat: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.growth, self.beat = growth, beat
        self.mean_square: dict[int, Range] = {}
        self.limited: dict[str, Range] = {}

    def _note(self, name: str, seen: torch.Tensor) -> None:
        if seen.numel():
            self.limited[name] = _wider(self.limited.get(name), seen)

    def linear(self, x: Handle, weight: Handle, bias: Handle = None) -> Handle:
        out = super().linear(x, weight, bias)
        self._note("linear", out)
        return out

    def rms_norm(self, x: Handle, weight: Handle, eps: float, scale: float) -> Handle:
        self.beat()
        mean_square = x.square().mean(-1) + eps
        self.mean_square[id(weight)] = _wider(self.mean_square.get(id(weight)), mean_square)
        self._note("rms_norm", mean_square * x.shape[-1])
        return super().rms_norm(x, weight, eps, scale)

    def softmax(self, scores: Handle, mask: torch.Tensor | None = None) -> Handle:
        """Rows as they are, and longer: with the largest score once and as many more of all others as it is longer.

        "softmax below": a score less the row's largest. "softmax hidden": the same of one that the mask hides.
        """
        seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
        visible = scores.masked_fill(~seen, -math.inf)
        largest = visible.amax(-1, keepdim=True)
        below = scores - largest
        others = (visible - largest).exp().sum(-1, keepdim=True) - 1
        self._note("softmax", scores[seen])
        self._note("softmax below", below[seen])
        self._note("softmax hidden", below[~seen])
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
        self._note("swiglu product", gate * up)
        return super().swiglu(gate, up)

    def residual(self, x: Handle, y: Handle) -> Handle:
        out = super().residual(x, y)
        self._note("residual", out)
        self._note("residual added", y)
        return out


def _wider(before: Range | None, seen: torch.Tensor) -> Range:
    """The range with what was seen; not a number once anything is."""
    low, high = seen.min().item(), seen.max().item()
    if before is None:
        return low, high
    both = torch.tensor([*before, low, high], dtype=torch.float64)
    return both.min().item(), both.max().item()


@torch.inference_mode()
def measure(
    config: LlamaConfig,
    weights: Mapping[str, torch.Tensor],
    text: Sequence[int] = (),
    beat: Callable[[int], None] = lambda done: None,
) -> Ranges:
    """Ranges of the model whose ``weights`` (float, by name, prepared by ``llama.prepare``) are given.

    text: token ids, of which each stretch of the model's context is run on its own. ``ROWS`` random tokens, drawn with
    a fixed seed, come besides; they are no secret. Other text may reach further. beat: called now and then with how
    many tokens are done.
    """
    done = 0
    recorder = _Recorder(beat=lambda: beat(done))
    model = Llama(recorder, config, dict(weights))
    longest = max(config.context if window is None else window for window in config.windows or (None,))
    random = torch.randint(
        config.vocab_size, (min(ROWS, config.context),), generator=torch.Generator().manual_seed(0)
    ).tolist()
    pieces = [list(text[start : start + config.context]) for start in range(0, len(text), config.context)]
    for ids in [*pieces, random]:
        recorder.growth, cache = max(longest / len(ids), 1.0), model.new_cache()
        for start in range(0, len(ids), ROWS):
            rows = ids[start : start + ROWS]
            model(recorder.tokens(torch.tensor(rows), len(rows), config.vocab_size), cache, seq_len=len(ids))
            done += len(rows)
    found = {name: recorder.mean_square.get(id(weight)) for name, weight in weights.items()}
    tokens = ({TEXT: len(text)} if text else {}) | {RANDOM: len(random)}
    mean_square = {name: range for name, range in found.items() if range}
    return Ranges(mean_square, recorder.limited, _largest(proofs(config, weights)), tokens)


def proofs(config: LlamaConfig, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    """What bounds the result of every linear layer behind a norm, and of the embedding, by the layer's last name.

    Before its weight, a norm's output of H elements is no longer than sqrt(H). So no product with a row of the linear
    layer's weight is larger than sqrt(H) times that row's length, once it has taken in the norm's weight.
    """
    layers = [name.removesuffix(".weight") for name, weight in weights.items() if weight.dim() == 2]
    tied = {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
    for name in [*layers, *tied]:
        weight = weights[f"{tied.get(name, name)}.weight"]
        if name == EMBEDDING:
            yield "embed_tokens", weight.abs().max().item()
        elif norm := config.family.norm_before(name):
            reach = row_lengths(weight, weights[f"{norm}.weight"]) * weight.shape[1] ** 0.5
            bias = weights.get(f"{name}.bias")
            yield name.rpartition(".")[2], (reach if bias is None else reach + bias.abs()).max().item()


def _largest(found: Iterator[tuple[str, float]]) -> dict[str, float]:
    most: dict[str, list[float]] = {}
    for name, value in found:
        most.setdefault(name, []).append(value)
    return {name: torch.tensor(values, dtype=torch.float64).max().item() for name, values in most.items()}  # or NaN


def enough_of(text: Sequence[int], config: LlamaConfig, parameters: int) -> Sequence[int]:
    """The beginning of a text that nobody chose: ``ROWS`` to ``MOST`` tokens, by the model's size."""
    return text[: min(config.context, MOST, max(ROWS, int(WORK / parameters)))]
