"""Policy ``far_blocks``: a few heads look far, and a prompt's end says which blocks of that its answer reads."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from eviction.head_split import HeadSplit
from eviction.operations import Layer, Operations, Seen
from eviction.policy import HeadGroup, Policy
from eviction.rows import add_mass, keep_picked, pooled, spread
from eviction.settings import budget, fitting, tokens, whole


@dataclass(frozen=True)
class FarBlocks(HeadSplit):
    """Heads are split as by ``head_split``. Those that look far see everything while a prompt is read, and less while
    it is answered: the first ``start`` and the ``last`` rows, and between them the blocks of ``block`` rows that drew
    most attention from the prompt's last ``window`` tokens, together with ``reach`` neighbours on either side. That is
    one choice a turn, of the attention of all these heads in all layers together: what one of them finds the others
    read. A further turn of a conversation is read with all rows again, and chooses anew.

    budget: rows that a head which looks far reads of all that came before the answer. window: a question's length. far,
    start, recent, reading, weights: as for ``head_split``.

    Source: this project. The attention that chooses is SnapKV's (Li et al. 2024), the split DuoAttention's (Xiao et al.
    2024), and that layers share a choice MPCache's (Zeng et al. 2025), here all of them. A token of an answer compares
    nothing, so it has the rounds that it has with all rows.
    """

    recent: int = whole(128, 1)
    budget: float = budget(0.4)
    block: int = whole(8, 1)
    window: int = whole(32, 1)
    reach: int = whole(1, 0)
    last: int = whole(32, 1)

    name: ClassVar[str] = "far_blocks"
    paper: ClassVar[str] = ""
    arxiv: ClassVar[str] = ""
    shared_over: ClassVar[str] = "all layers"
    cost: ClassVar[str] = "none after the prefill, which ends with one top-k over blocks"
    style: ClassVar[tuple[str, str, str]] = ("#0072B2", "o", "-")
    uses: ClassVar[tuple[str, ...]] = ("mass", "within", "total", "public", "top", "picks", "keep", "take")

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        """Half of the rows that a step reads are of heads that look far, or all that these have."""
        near = 1 - cls.far
        seen = max(rows / 2, rows - cls.far * prompt_tokens) / near
        chosen = max(1.0, (rows - near * seen) / cls.far)
        start = fitting(cls.start, seen / 4)
        sizes = {"start": start, "recent": max(1, round(seen) - start), "budget": max(2, round(chosen))}
        return {**sizes, "last": fitting(cls.last, chosen / 4), "block": fitting(cls.block, chosen / 8), **changed}

    def split(self, layer: Layer) -> tuple[HeadGroup, ...]:
        far = int(self.looks_far(layer.layers, layer.kv_heads).sum())
        inside = _Blocks(self.start, self.budget, self.block, self.window, self.reach, self.last, far)
        groups = super().split(layer)
        return tuple(group if group.window else replace(group, policy=inside) for group in groups)


@dataclass(frozen=True)
class _Blocks(Policy):
    """What the heads that look far do, of which there are ``heads``. All rows are noted before some are left out, for
    the turns to come."""

    start: int = whole(FarBlocks.start, 0)
    budget: float = budget(FarBlocks.budget)
    block: int = whole(FarBlocks.block, 1)
    window: int = whole(FarBlocks.window, 1)
    reach: int = whole(FarBlocks.reach, 0)
    last: int = whole(FarBlocks.last, 1)
    heads: int = whole(1, 1)

    name: ClassVar[str] = FarBlocks.name

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        rows = seen.positions >= layer.prompt_tokens - self.window
        if rows.any():
            drawn = ops.total(ops.mass(seen.weights, spread(layer, rows)), 0)
            add_mass(ops, layer.common, drawn.reshape(1, len(layer)), limit=self.window * self.heads)

    def evict(self, ops: Operations, layer: Layer) -> None:
        rows = len(layer)
        blocks = (rows - self.start - self.last) // self.block
        stop = self.start + blocks * self.block
        count = max(1, (tokens(self.budget, layer.prompt_tokens) - self.start - (rows - stop)) // self.block)
        mass = layer.common.pop("mass", None)
        if count >= blocks:
            return
        if mass is not None:  # in the first of the layers, for all of them
            limit = self.window * self.heads  # all of a query's attention is 1
            drawn = mass[..., self.start : stop].reshape(1, blocks, self.block)
            likeness = pooled(ops, ops.within(ops.total(drawn, 2), limit), self.reach, limit)
            layer.common["picks"] = ops.picks(ops.top(likeness, count), count)
        layer.notes |= {"all keys": layer.keys, "all values": layer.values}
        keep_picked(ops, layer, layer.common["picks"], self.start, rows - stop, size=self.block)
        layer.notes["read"] = len(layer)

    def go_on(self, ops: Operations, layer: Layer, turn_tokens: int) -> None:
        """All rows again, with those that the answer added behind them."""
        if "read" not in layer.notes:
            return
        added = torch.arange(layer.notes.pop("read"), len(layer))
        for name in ("keys", "values"):
            everything = layer.notes.pop(f"all {name}")
            if len(added):
                everything = ops.cat([everything, ops.take(getattr(layer, name), added)], 1)
            setattr(layer, name, everything)
        layer.positions = torch.arange(len(layer))
