"""Policy ``mpcache_spread``: MPCache's clusters, found by their keys' spread too, in the layers that look far back."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction.operations import Choice, Handle, Layer, Operations, Seen
from eviction.policy import Policy
from eviction.quest import page_ends
from eviction.rows import note_more, take
from eviction.settings import budget, fitting, number, switch, tokens, whole

SQUARED = 2.0**16  # coordinates of queries, and half widths of blocks, are below 256
FIRST = 16  # rows that a layer of ends keeps of the prompt's beginning, if they are a third of its rows at most


@dataclass(frozen=True)
class MPCacheSpread(Policy):
    """Layers in the middle keep all rows and attend to the likeliest blocks of them; the others keep the ends alone.

    A block of ``block`` rows counts as the attention that keys would draw on average which fill the box between its
    largest and its least value of each coordinate evenly. To second order the logarithm of that is q·m + q²·w²/6, for
    the box's middle m and half its width w: Quest's bound takes |q|·w instead, and with it a comparison per coordinate.
    The first block and the newest, which grows until it is full, are always attended to. Neither a query's coordinate
    nor half a block's width is 256 or more.

    budget: rows attended to, the mean over layers. lower, upper: shares of the layers, from below and from above, that
    keep the prompt's first rows and the last ones, together half the budget, or ``ends`` rows where that is more; the
    layers between have what those leave. A budget below half of ``ends`` leaves the ends too little to be of use, and
    every layer searches then. width: whether q²·w²/6 counts, or q·m alone. per_head: each kv head chooses
    for itself, not all of a layer together.

    Source: this project, from what MPCache (Zeng et al. 2025) loses on the shipped model. Which of its layers look far
    back is measured in docs/eviction.md; set lower=0,upper=0 for a model of which it is not known.
    """

    budget: float = budget(0.2)
    block: int = whole(16, 1)
    ends: int = whole(48, 1)
    lower: float = number(0.5, 0.0, 1.0)
    upper: float = number(0.2, 0.0, 1.0)
    width: bool = switch(True)
    per_head: bool = switch(False)

    name: ClassVar[str] = "mpcache_spread"
    when: ClassVar[str] = "prefill and step"
    shared_over: ClassVar[str] = "layer"
    cost: ClassVar[str] = "in the middle layers a square, two products over blocks and a top-k; in the others none"
    style: ClassVar[tuple[str, str, str]] = ("#D55E00", "s", "-")
    uses: ClassVar[tuple[str, ...]] = (
        *("take", "contents", "largest", "scale", "multiply", "within", "fixed", "total"),
        *("best", "gather_scores", "scatter_weights"),
    )

    @property
    def period(self) -> int:
        return self.block

    def fills(self, prompt_tokens: int) -> bool:
        return prompt_tokens % self.block == 0

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        return {"budget": rows, "block": fitting(cls.block, rows / 8), **changed}

    def searching(self, layer: Layer) -> range:
        """The layers that keep all rows and choose among them."""
        layers = layer.layers
        if 2 * tokens(self.budget, layer.prompt_tokens) < self.ends:
            return range(layers)
        first = min(int(self.lower * layers), layers - 1)
        return range(first, max(first + 1, layers - int(self.upper * layers)))

    def rows(self, layer: Layer) -> tuple[int, int]:
        """Rows that a layer of ends attends to, and one that searches."""
        mean, searching = tokens(self.budget, layer.prompt_tokens), len(self.searching(layer))
        ends = min(mean, max(self.ends, mean // 2))
        return ends, ends + (mean - ends) * layer.layers // searching

    def watches(self, prompt_tokens: int) -> int:
        return 0  # keys and places alone

    def evict(self, ops: Operations, layer: Layer) -> None:
        if layer.index in self.searching(layer):
            self._summarise(ops, layer)
        else:
            self._keep_ends(ops, layer)

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        if layer.index not in self.searching(layer):
            self._keep_ends(ops, layer)

    def _keep_ends(self, ops: Operations, layer: Layer) -> None:
        ends, _ = self.rows(layer)
        if len(layer) > ends:
            index, first = torch.arange(len(layer)), min(FIRST, ends // 3)
            take(ops, layer, torch.cat([index[:first], index[first - ends :]]))

    def choose(self, ops: Operations, layer: Layer, query: Handle, query_before: Handle) -> Choice | None:
        if layer.index not in self.searching(layer):
            return None
        self._summarise(ops, layer)
        blocks = layer.notes.get("blocks", 0)
        count = max(1, self.rows(layer)[1] // self.block - 1)
        if count >= blocks:
            return None
        rows = torch.arange(len(layer))
        public = torch.cat([rows[: self.block], rows[(blocks + 1) * self.block :]])
        return Choice(public, ops.best(self._likeness(ops, layer, query), count), self.block, self.block)

    def _likeness(self, ops: Operations, layer: Layer, query: Handle) -> Handle:
        """[G or 1, C], added over the heads that choose together."""
        likeness = ops.scores(query, layer.notes["middle"])
        if self.width:
            squared = ops.within(ops.multiply(query, query), SQUARED)
            likeness = ops.add(likeness, ops.scores(squared, layer.notes["spread"]))
        likeness = ops.total(likeness, 1)
        return likeness if self.per_head else ops.total(likeness, 0).reshape(1, -1)

    def _summarise(self, ops: Operations, layer: Layer) -> None:
        """Boxes of the blocks that are full, not the first and not the newest, once each."""
        done, blocks = layer.notes.get("blocks", 0), (len(layer) - 1) // self.block - 1
        if blocks <= done:
            return
        high, low = page_ends(ops, layer, range(done + 1, blocks + 1), self.block)
        note_more(ops, layer, "middle", ops.fixed(ops.scale(ops.add(high, low), 0.5)), 1)
        if self.width:
            width = ops.scale(ops.add(high, ops.scale(low, -1)), 0.5)
            sixth = math.log(ops.softmax_base) / 6  # of what is an exponent of e
            squared = ops.within(ops.multiply(width, width), SQUARED)
            note_more(ops, layer, "spread", ops.fixed(ops.scale(squared, sixth)), 1)
        layer.notes["blocks"] = blocks
