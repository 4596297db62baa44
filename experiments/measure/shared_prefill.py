"""One prefill with full attention that many eviction policies watch, each of which then evicts from its own copy.

Owns the sharing. Most policies only look at the prompt's attention and evict at its end, so what they see and what the
cache holds does not depend on which of them runs. One that changes the prefill itself (``locret`` drops rows after
each piece) is noticed when it does, and gets a prefill of its own; the numbers are those of a run alone either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from crypten_llm.models.cache import KVCache
from eviction import Policy


class Once:
    """The operations of ``ops``, of which ``mass`` is computed once for all policies that ask the same of one pass.

    It is most of what watching costs; the numbers are the same, since nothing changes a tensor in place.
    """

    def __init__(self, ops):
        self._ops, self._weights, self._found = ops, None, {}

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def mass(self, weights, queries):
        if weights is not self._weights:
            self._weights, self._found = weights, {}
        key = tuple(queries.tolist())
        if key not in self._found:
            self._found[key] = self._ops.mass(weights, queries)
        return self._found[key]


class Onlookers:
    """In place of a policy: shows each pass over the prompt to all of ``policies`` and changes nothing itself.

    policies: by text. apart: policies, by their text, that changed a pass and have seen no more since.
    """

    name, acts = "onlookers", True

    def __init__(self, policies: dict):
        self.policies = dict(policies)
        self.uses = sorted({name for policy in policies.values() for name in policy.uses})
        self.reads_scores = any(policy.reads_scores for policy in policies.values())
        self.apart: list[str] = []
        self._layers: dict[str, list] = {text: [] for text in policies}
        self._common: dict[str, dict] = {text: {} for text in policies}

    def split(self, layer):
        """Heads stay together; a policy that splits them goes apart."""
        for text, policy in list(self.policies.items()):
            if policy.split(layer):
                self.apart.append(text)
                del self.policies[text]
        return ()

    def begin(self, ops, layer):
        for text, policy in self.policies.items():
            before = self._layers[text][-1] if layer.index else None
            own = replace(layer, notes={}, common=self._common[text], before=before)
            self._layers[text].append(own)
            policy.begin(ops, own)

    def enter(self, ops, layer, query, key, value):
        self._show("enter", ops, layer, query, key, value, alike=(query, key, value))
        return query, key, value

    def leave(self, ops, layer, mixed):
        self._show("leave", ops, layer, mixed, alike=mixed)
        return mixed

    def watch(self, ops, layer, seen):
        self._show("watch", Once(ops), layer, seen)

    def _show(self, hook: str, ops, layer, *shown, alike=None) -> None:
        for text, policy in list(self.policies.items()):
            own = self._layers[text][layer.index]
            own.keys, own.values, own.positions = layer.keys, layer.values, layer.positions
            back = getattr(policy, hook)(ops, own, *shown)
            if own.keys is not layer.keys or own.values is not layer.values or not _same(back, alike):
                self.apart.append(text)
                del self.policies[text]

    def cache(self, text: str, seen: KVCache) -> KVCache:
        """The cache that a prefill alone would have left, before its prompt has ended; ``seen``: what was watched."""
        layers, below = [], None
        for cache, own in zip(seen.layers, self._layers[text], strict=True):
            layers.append(cache.handed_to(self.policies[text], own.notes, below))
            below = layers[-1].layer
            below.common = self._common[text]
        return KVCache(layers, seen.length)


def _same(found, expected) -> bool:
    """Whether two handles, or tuples of them, are the same objects."""
    if isinstance(expected, tuple):
        return all(a is b for a, b in zip(found, expected, strict=True))
    return found is expected


def prefill(model, policy, ids: list[int], chunk: int) -> tuple[KVCache, torch.Tensor]:
    """The cache of a prompt that has not ended yet, and the logits [V] after it."""
    cache, engine, vocab = model.new_cache(), model.engine, model.config.vocab_size
    cache.follow(policy, len(ids))
    for start in range(0, len(ids), chunk):
        part = torch.tensor(ids[start : start + chunk])
        hidden = model.extend(engine.tokens(part, len(part), vocab), cache, seq_len=len(ids))
    return cache, model.logits(hidden[-1:])[0]


def prefill_all(model, policies: Mapping[str, Policy], ids: list[int], chunk: int):
    """Yields (policy's key, its cache when it has evicted, logits [V] after the prompt), for each policy.

    Caches share the prompt's rows; going on with one leaves the others as they are. On engine ``plain`` alone.
    Raises UsageError for a policy that does not fit the model.
    """
    onlookers = Onlookers(policies)
    seen, logits = prefill(model, onlookers, ids, chunk)
    for text in onlookers.policies:
        cache = onlookers.cache(text, seen)
        cache.end_prompt()
        yield text, cache, logits
    for text in onlookers.apart:
        cache, own = prefill(model, policies[text], ids, chunk)
        cache.end_prompt()
        yield text, cache, own
