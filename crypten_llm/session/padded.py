"""Decode steps that are all alike: one answer's cache in room of one size, whatever its length.

Owns how a cache goes there and comes back. A step is then the same
program with other numbers, which a GPU runs as it was captured (``engines.wire.captured``); the same room serves one
answer after another.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from crypten_llm.models.cache import KVCache

if TYPE_CHECKING:
    from crypten_llm.models.llama import Llama
    from eviction.operations import Handle


class Padded:
    """A model's cache with room for ``size`` rows, of one answer at a time."""

    def __init__(self, model: Llama, size: int) -> None:
        engine = model.engine
        self.size, self._model = size, model
        self._places = engine.places(size)
        self._cache: KVCache = model.new_cache()
        for layer in self._cache.layers:
            layer.places = self._places
        self._step = engine.repeated(partial(model.step, self._cache))
        self._of: KVCache | None = None
        self._pads = range(0)

    def begin(self, cache: KVCache, pads: int = 0) -> None:
        """Takes in what a cache holds; it grows here until ``end``. pads: of its rows the last, which no step sees."""
        engine = self._model.engine
        for room, layer in zip(self._cache.layers, cache.layers, strict=True):
            if layer.keys is None:  # of a layer that nobody runs
                continue
            for name in ("keys", "values"):
                rows = engine.padded(getattr(layer, name), self._places, getattr(room.layer, name))
                setattr(room.layer, name, rows)
        self._of, self._pads = cache, range(cache.length, cache.length + pads)

    def step(self, one_hot: Handle) -> Handle:
        """Logits [1, V] of the next token."""
        assert self._of is not None, "a cache grows here"
        self._places.put(self._of.length + len(self._pads), self._pads)
        return self._step(one_hot, *self._model.turning(self._of))

    def end(self) -> None:
        """Gives the cache its rows back, but for one with pads, with which nobody goes on."""
        assert self._of is not None, "a cache grew here"
        if self._pads:
            self._of = None
            return
        for room, layer in zip(self._cache.layers, self._of.layers, strict=True):
            if layer.keys is None:
                continue
            for name in ("keys", "values"):
                setattr(layer.layer, name, self._model.engine.unpadded(getattr(room.layer, name), self._of.length))
        self._of = None
