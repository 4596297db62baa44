"""A public prefix at each party: the first tokens of a prompt that all know, computed by the owner in the clear.

Owns how keys and values of such tokens get into the caches: the owner runs its model over them (engine ``plain``), and
the engine makes rows of the results, which are the weights' secret and stay one. No party but the owner computes
anything, nothing is opened and no dealer is asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from crypten_llm.errors import UsageError

if TYPE_CHECKING:
    from crypten_llm.engines.base import Engine
    from crypten_llm.models.llama import Llama
    from eviction import Policy
    from eviction.operations import Handle

Kept = TypeVar("Kept")
Which = tuple[tuple[int, ...], int]  # ids, and the prompt's length where the positions' frequencies depend on it

KEPT = 4
"""Prefixes of a session that are kept, those that were used last."""
CHUNK = 128  # tokens of a pass in the clear


class Prefixes:
    """The prefixes that one party has met since its model was loaded.

    The owner computes each once, and so does engine ``wire`` send each once: rows are the same handles in every request
    that begins with them, as weights are. A tape, and a stock's block, is dealt for requests that may begin in other
    ways: with one, rows are made anew for each.
    """

    def __init__(self, engine: Engine, model: Llama, in_the_clear: Callable[[], Llama] | None) -> None:
        """in_the_clear: gives the model on engine ``plain``, to this engine's ``softmax_base``; at the owner alone."""
        self._engine, self._model, self._in_the_clear = engine, model, in_the_clear
        self._known: OrderedDict[Which, list[tuple[torch.Tensor, torch.Tensor]]] = OrderedDict()
        self._rows: OrderedDict[Which, list[tuple[Handle, Handle]]] = OrderedDict()

    def rows(self, ids: Sequence[int], length: int) -> list[tuple[Handle, Handle]]:
        """By layer, the keys and values of these tokens at the beginning of a prompt of ``length`` tokens, without
        those that the layer's window has left behind when the next token comes.

        Raises: UsageError at the owner for what the engine cannot hold.
        """
        which = tuple(ids), length if length > self._model.frequencies_hold else 0
        if which in self._rows and self._engine.dealer_follows:
            return _remember(self._rows, which, self._rows[which])
        known, config, engine = self._computed(which), self._model.config, self._engine
        made = []
        for index, window in enumerate(config.windows or (None,) * config.num_hidden_layers):
            count = len(ids) if window is None else min(len(ids), window - 1)
            keys, values = known[index] if known else (None, None)
            shape = (config.num_key_value_heads, count, config.head_dim)
            made.append((engine.known_rows(keys, shape), engine.known_rows(values, shape, values=True)))
        return _remember(self._rows, which, made) if engine.dealer_follows else made

    def _computed(self, which: Which) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """At the owner the floats, by layer; nothing elsewhere."""
        if self._in_the_clear is None:
            return []
        if which in self._known:
            return _remember(self._known, which, self._known[which])
        (ids, length), model = which, self._in_the_clear()
        cache = model.new_cache()
        for start in range(0, len(ids), CHUNK):
            chunk = torch.tensor(ids[start : start + CHUNK])
            model.extend(model.engine.tokens(chunk, len(chunk), model.config.vocab_size), cache, length)
        for layer in cache.layers:
            layer.slide()
        return _remember(self._known, which, [(layer.keys, layer.values) for layer in cache.layers])


def _remember(kept: OrderedDict[Which, Kept], which: Which, made: Kept) -> Kept:
    """``made``, which is now the one that was used last."""
    kept[which] = made
    kept.move_to_end(which)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return made


def check_policy(policy: Policy, prefix_tokens: int, prompt_tokens: int) -> None:
    """Raises UsageError where the policy must be shown more of a prompt than what follows its public prefix."""
    watched = policy.watches(prefix_tokens + prompt_tokens)
    if prefix_tokens and watched > prompt_tokens:
        which = "all of a prompt" if watched == prefix_tokens + prompt_tokens else f"a prompt's last {watched} tokens"
        raise UsageError(
            f"policy {policy} must see the attention of {which}, but {prompt_tokens} tokens follow the public prefix; "
            "leave the prefix out or choose another policy (--policy)"
        )
