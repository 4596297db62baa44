"""Policy ``infllm``: blocks of the distant past, found by their few most looked-at keys."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction.operations import Choice, Handle, Layer, Operations, Seen
from eviction.policy import Policy
from eviction.rows import add_mass, note_more
from eviction.settings import fitting, whole

SCORE = 128.0  # what no attention score exceeds, as an exponent of 2 or of e
LARGEST = 2.0**16  # coordinates of keys are below


@dataclass(frozen=True)
class InfLLM(Policy):
    """Keeps all rows. A step attends to the first ``initial`` rows, the last ``local`` ones, and the ``blocks`` blocks
    between them whose representative is most like the query, the same for all heads of a layer.

    A row's importance is the sum of its scores with the queries of the ``local`` positions after it; a block's
    representative is the mean of its ``representatives`` most important keys.

    Source: Xiao et al. 2024, section 3; sizes of the authors' configurations. Deviations: distant keys keep their
    rotary position, where the paper gives all of them one; rows between the last whole block and the window are
    attended to; nothing is moved out of memory, so there is no cache of blocks.
    """

    block: int = whole(128, 1)
    blocks: int = whole(16, 1)
    representatives: int = whole(4, 1)
    initial: int = whole(128, 0)
    local: int = whole(4096, 1)

    name: ClassVar[str] = "infllm"
    paper: ClassVar[str] = "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory"
    arxiv: ClassVar[str] = "2402.04617"
    when: ClassVar[str] = "step"
    shared_over: ClassVar[str] = "layer"
    cost: ClassVar[str] = "one product over blocks, one top-k over blocks per layer; scores are opened once more"
    reads_scores: ClassVar[bool] = True
    goes_on: ClassVar[bool] = True
    style: ClassVar[tuple[str, str, str]] = ("#56B4E9", "^", "-")
    uses: ClassVar[tuple[str, ...]] = (
        *("scale", "total", "within", "contents", "take", "fixed", "top", "gather", "best"),
        *("gather_scores", "scatter_weights"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.representatives > self.block:
            raise self.refuse(f"representatives is {self.representatives}; a block has {self.block} rows, give fewer")

    @property
    def period(self) -> int:
        return self.block

    def fills(self, prompt_tokens: int) -> bool:
        return (prompt_tokens + 1 - self.local - self.initial) % self.block == 0

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        """Of 6,272 rows read in the authors' configuration, 2 % are sinks, 33 % retrieved, the rest is the window.

        Their 16 blocks stay 16, as near as blocks of a power of two allow: few long ones would be represented by too
        little.
        """
        block, initial = fitting(cls.block, rows / 48), max(1, rows // 50)
        blocks = max(1, round(rows / 3 / block))
        spare = block // 2  # rows between the last whole block and the window, on average
        local = max(1, rows - initial - blocks * block - spare)
        sizes = {"block": block, "blocks": blocks, "representatives": min(cls.representatives, block)}
        return {**sizes, "initial": initial, "local": local, **changed}

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        """Scores that fall into the window after a key, added up. On shares that opens them, to make room for a sum."""
        rows = seen.weights.shape[-1]
        distance = seen.positions[:, None] - torch.arange(rows)
        near = ((distance > 0) & (distance <= self.local)).float()
        per_query = near.repeat(layer.group, 1) / layer.group
        sums = ops.total(ops.scale(seen.scores, per_query), 1)
        add_mass(ops, layer.notes, sums, limit=SCORE * self.local, note="importance")

    def evict(self, ops: Operations, layer: Layer) -> None:
        self._summarise(ops, layer)

    def choose(self, ops: Operations, layer: Layer, query: Handle, query_before: Handle) -> Choice | None:
        self._summarise(ops, layer)
        blocks = layer.notes.get("blocks", 0)
        if self.blocks >= blocks:
            return None
        likeness = ops.total(ops.total(ops.scores(query, layer.notes["keys"]), 1), 0).reshape(1, blocks)
        rows = torch.arange(len(layer))
        public = torch.cat([rows[: self.initial], rows[self.initial + blocks * self.block :]])
        return Choice(public, ops.best(likeness, self.blocks), self.initial, self.block)

    def _summarise(self, ops: Operations, layer: Layer) -> None:
        """Representatives of the blocks that have left the window since the last call."""
        done = layer.notes.get("blocks", 0)
        blocks = max(0, (len(layer) - self.local - self.initial) // self.block)
        if blocks <= done:
            return
        start, stop = self.initial + done * self.block, self.initial + blocks * self.block
        shape = (layer.kv_heads, blocks - done, self.block)
        best = ops.top(layer.notes["importance"][..., start:stop].reshape(*shape), self.representatives)
        keys = ops.contents(ops.take(layer.keys, torch.arange(start, stop))).reshape(*shape, layer.head_dim)
        sums = ops.gather(best.reshape(*shape[:2], 1, self.block), keys).reshape(*shape[:2], layer.head_dim)
        means = ops.fixed(ops.within(ops.scale(sums, 1 / self.representatives), LARGEST))
        note_more(ops, layer, "keys", means, 1)
        layer.notes["blocks"] = blocks

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        self.watch(ops, layer, seen)
