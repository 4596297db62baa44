"""Where a model's queries point, as its owner finds out in the clear: for the policies that look once.

Owns the measurement and the files. The owner's model reads prompts; of each kv head's queries their second moments and
of its keys the largest norm are kept, and from these come vectors of which a policy takes products with keys. Only the
order of the products within a head counts, so that they are written in a length that engines compare well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors.torch import save

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.models.llama import Llama
from eviction.policy import Policy

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig
    from eviction.operations import Layer, Operations, Seen

CHUNK = 128
LARGEST = 64.0  # of a product, for keys no longer than any that were seen; shares compare products below 128


@dataclass(frozen=True)
class _Watching(Policy):
    """Keeps every row, and adds up what it is shown."""

    name: ClassVar[str] = "watching"

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        query = seen.query.reshape(layer.heads, len(seen.positions), layer.head_dim).double()
        before = seen.query_before.reshape(query.shape).double().sum(1)
        found = {"sum": query.sum(1), "before": before, "moments": query.mT @ query}
        for name, value in found.items():
            layer.notes[name] = layer.notes.get(name, 0) + value
        longest = seen.key.norm(dim=-1).amax(1)
        layer.notes["longest"] = torch.maximum(layer.notes.get("longest", longest), longest)


@dataclass(frozen=True)
class Statistics:
    """sums, before: of queries [layers, heads, head_dim], rotated, and before the rotary embedding. moments: sums of
    the rotated ones' outer products [layers, heads, head_dim, head_dim]. longest: norms of the longest keys [layers,
    kv_heads]."""

    sums: torch.Tensor
    before: torch.Tensor
    moments: torch.Tensor
    longest: torch.Tensor


@torch.inference_mode()
def measure(
    config: LlamaConfig,
    weights: Mapping[str, torch.Tensor],
    prompts: Sequence[Sequence[int]],
    beat: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Over all tokens of the prompts. beat: called with how many prompts are done."""
    model, found = Llama(PlainEngine(), config, dict(weights)), None
    for done, ids in enumerate(prompts):
        cache = model.new_cache()
        cache.follow(_Watching(), len(ids))
        for start in range(0, len(ids), CHUNK):
            rows = torch.tensor(ids[start : start + CHUNK])
            model.extend(model.engine.tokens(rows, len(rows), config.vocab_size), cache, len(ids))
        notes = [layer.layer.notes for layer in cache.layers]
        sums, before, moments = (torch.stack([one[name] for one in notes]) for name in ("sum", "before", "moments"))
        longest = torch.stack([one["longest"] for one in notes])
        if found is None:
            found = Statistics(sums, before, moments, longest)
        else:
            longest = torch.maximum(found.longest, longest)
            found = Statistics(found.sums + sums, found.before + before, found.moments + moments, longest)
        beat(done + 1)
    assert found is not None, "prompts are given"
    return found


def filters(found: Statistics) -> torch.Tensor:
    """[layers, kv_heads, head_dim]: of each query head the first singular vector of its queries, on the side of their
    mean; of these the mean over a kv head's group (Godey et al. 2025, arXiv 2503.02812, section 3)."""
    first = torch.linalg.eigh(found.moments)[1][..., -1]
    first = first * torch.where((first * found.sums).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return _of_groups(found, first)


def centers(found: Statistics) -> torch.Tensor:
    """[layers, kv_heads, head_dim]: the mean of a kv head's queries before the rotary embedding (Mao et al. 2026, arXiv
    2604.04921, section 4)."""
    return _of_groups(found, found.before)


def _of_groups(found: Statistics, vectors: torch.Tensor) -> torch.Tensor:
    """The mean over a kv head's group, in the length in which it is written."""
    layers, kv_heads = found.longest.shape
    grouped = vectors.reshape(layers, kv_heads, -1, vectors.shape[-1]).mean(2)
    return grouped / grouped.norm(dim=-1, keepdim=True) * LARGEST / found.longest[..., None]


def file(name: str, vectors: torch.Tensor) -> bytes:
    """What ``--policy-weights`` takes: ``filters`` for the policy ``qfilters``, ``centers`` for ``triattention``."""
    return save({name: vectors.half().contiguous()})
