"""Which tokens a repetition of the text looks at, learned by the model's owner in the clear: for a linear score.

Owns the labels, the fit and the file. The model reads a text twice, with the request to repeat it between; a token's
label, one for each kv head, is the largest attention that it draws from the second reading, times the length of its
value behind the output matrix, as a logarithm (KVzip+, Jegou and Jeblick 2026, arXiv 2601.07891, section 3, without the
division by the length of the hidden state that looks). A linear map of the token's queries, keys and values is fitted
to the labels by ridge regression; how strong the ridge is, is found on texts that the fit does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors.torch import save

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.models.llama import Llama
from eviction import trained
from eviction.policy import Policy

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig
    from eviction.operations import Layer, Operations, Seen

AGAIN = "\n\nRepeat the previous context exactly.\n\n"
LONGEST = 512  # tokens of a text, which is read twice
TEXTS = 24
HELD_OUT = 4  # of so many texts one is kept from the fit
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean square of a feature
LEAST = 2.0**-24  # attention of which the logarithm is taken
LARGEST = 6.0  # of a written score, for the texts that were read


@dataclass(frozen=True)
class _Reading(Policy):
    """Keeps every row and what a fit needs of them: features [P, F] and labels [kv_heads, P] of the first ``rows``."""

    rows: int = field(default=0, metadata={"read": int, "what": "tokens"})
    outputs: tuple = field(default=(), metadata={"read": tuple, "what": "output matrices by layer"})

    name: ClassVar[str] = "reading"

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        first = int(seen.positions[0])
        if first == 0:
            layer.notes["features"] = trained.features(ops, layer, seen)
            layer.notes["lengths"] = self._lengths(layer, seen)
            return
        group = seen.weights[..., : self.rows].reshape(layer.kv_heads, layer.group, -1, self.rows).amax(2)
        layer.notes["label"] = (group * layer.notes["lengths"]).amax(1).clamp_min(LEAST).log()

    def _lengths(self, layer: Layer, seen: Seen) -> torch.Tensor:
        """[kv_heads, group, P]: of values behind each query head's part of the output matrix."""
        output = self.outputs[layer.index].reshape(-1, layer.kv_heads, layer.group, layer.head_dim)
        inner = torch.einsum("hgad,hgae->gade", output, output)  # [kv_heads, group, D, D]
        return torch.einsum("gtd,gade,gte->gat", seen.value, inner, seen.value).clamp_min(0).sqrt()


@dataclass
class _Sums:
    """Of one layer's texts: what least squares takes. features [F, F], both [F, kv_heads], labels [kv_heads]."""

    count: int
    features: torch.Tensor
    both: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> _Sums:
        """x [P, F], y [P, kv_heads], each less its mean: a text's level says nothing of the order within it."""
        x, y = (part.double() - part.double().mean(0) for part in (x, y))
        return cls(len(x), x.T @ x, x.T @ y, y.square().sum(0))

    def __add__(self, other: _Sums) -> _Sums:
        made = (getattr(self, name) + getattr(other, name) for name in ("count", "features", "both", "labels"))
        return _Sums(*made)

    def fit(self, ridge: float) -> torch.Tensor:
        """[F, kv_heads]."""
        size = len(self.features)
        more = ridge * self.features.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        return torch.linalg.solve(self.features + more, self.both)

    def unexplained(self, found: torch.Tensor) -> torch.Tensor:
        """By kv head, the share of the labels' variance that a map leaves."""
        square = (found * (self.features @ found)).sum(0) - 2 * (found * self.both).sum(0) + self.labels
        return square / self.labels


@dataclass(frozen=True)
class Fit:
    """maps: by layer, [F, kv_heads]. explained: of the labels' variance in texts that were held out, [layers,
    kv_heads]."""

    maps: list[torch.Tensor]
    explained: torch.Tensor

    def file(self) -> bytes:
        """What ``--policy-weights`` takes, for the policy ``kvzap_linear``."""
        return save({f"layers.{i}.scores": found.half().contiguous() for i, found in enumerate(self.maps)})


@torch.inference_mode()
def fit(
    config: LlamaConfig,
    weights: Mapping[str, torch.Tensor],
    texts: Sequence[Sequence[int]],
    again: Sequence[int],
    beat: Callable[[int], None] = lambda done: None,
) -> Fit:
    """texts: token ids of each, two or more; again: of what stands before the repetition. beat: called with how many
    texts are done."""
    model = Llama(PlainEngine(), config, dict(weights))
    found: dict[bool, list[_Sums]] = {True: [], False: []}  # by layer, of texts that are held out and of the others
    outputs = [weights[f"model.layers.{i}.self_attn.o_proj.weight"] for i in range(config.num_hidden_layers)]
    for done, ids in enumerate(texts):
        cache, read = model.new_cache(), [*ids, *again, *ids]
        cache.follow(_Reading(len(ids), tuple(outputs)), len(read))
        for part in (read[: len(ids)], read[len(ids) :]):
            model.extend(model.engine.tokens(torch.tensor(part), len(part), config.vocab_size), cache, len(read))
        notes = [layer.layer.notes for layer in cache.layers]
        sums = [_Sums.of(note["features"], note["label"].T) for note in notes]
        kept = found[done % HELD_OUT == HELD_OUT - 1 or done == len(texts) - 1]
        kept[:] = [one + other for one, other in zip(kept, sums, strict=True)] if kept else sums
        beat(done + 1)
    maps, explained = [], []
    for seen, held_out in zip(found[False], found[True], strict=True):
        ridge = min(RIDGES, key=lambda ridge: held_out.unexplained(seen.fit(ridge)).mean())
        explained.append(1 - held_out.unexplained(seen.fit(ridge)))
        maps.append(_scaled((seen + held_out).fit(ridge), seen + held_out))
    return Fit(maps, torch.stack(explained))


def _scaled(found: torch.Tensor, sums: _Sums) -> torch.Tensor:
    """The map, in a length such that a sixth of ``LARGEST`` is the standard deviation of its scores."""
    deviation = ((found * (sums.features @ found)).sum(0) / sums.count).sqrt().clamp_min(1e-9)
    return (found * (LARGEST / 6) / deviation).float()
