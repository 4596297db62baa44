"""Policy ``quest``: at each step, the pages of the cache whose best possible score is highest."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction.operations import Choice, Handle, Layer, Operations
from eviction.policy import Policy
from eviction.rows import note_more
from eviction.settings import budget, fitting, tokens, whole


def page_bound(ops: Operations, query: Handle, high: Handle, low: Handle) -> Handle:
    """The most that q·k can be for a key between ``low`` and ``high``: relu(q)·high + (q - relu(q))·low.

    query [G, M, D], high and low rows [G, C, D]; returns [G, M, C]. Cost: a comparison per coordinate of the query.
    """
    positive = ops.multiply(ops.above(query, 0.0), query)
    negative = ops.add(query, ops.scale(positive, -1))
    return ops.add(ops.scores(positive, high), ops.scores(negative, low))


def page_ends(ops: Operations, layer: Layer, pages: range, page: int) -> tuple[Handle, Handle]:
    """Of each coordinate of the keys in these pages of ``page`` rows, the largest and the least: [G, C, D] each."""
    keys = ops.contents(ops.take(layer.keys, torch.arange(pages.start * page, pages.stop * page)))
    keys = keys.reshape(layer.kv_heads, len(pages), page, layer.head_dim)
    return ops.largest(keys, 2), ops.scale(ops.largest(ops.scale(keys, -1), 2), -1)


@dataclass(frozen=True)
class Quest(Policy):
    """Keeps all rows; each page of ``page`` rows is summed up by the largest and least of each coordinate of its keys.

    budget: rows attended to. dense: first layers, which attend to everything.

    Source: Tang et al. 2024, section 3. Deviations: one choice per kv head, bounds added over its query heads; the
    newest page, of 1 to ``page`` rows, is always attended to and counts as one of the budget's pages.
    """

    page: int = whole(16, 1)
    budget: float = budget(1024)
    dense: int = whole(2, 0)

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference"
    arxiv: ClassVar[str] = "2406.10774"
    when: ClassVar[str] = "step"
    shared_over: ClassVar[str] = "kv head"
    cost: ClassVar[str] = "a comparison per coordinate of the query, two products and a top-k over pages"
    goes_on: ClassVar[bool] = True
    budget_means: ClassVar[str] = "as published leaves two layers whole"
    style: ClassVar[tuple[str, str, str]] = ("#0072B2", "s", "--")
    uses: ClassVar[tuple[str, ...]] = (
        *("contents", "take", "fixed", "largest", "scale", "above", "multiply", "total"),
        *("best", "gather_scores", "scatter_weights"),
    )

    @property
    def period(self) -> int:
        return self.page

    def fills(self, prompt_tokens: int) -> bool:
        return prompt_tokens % self.page == 0

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        return {"budget": rows, "page": fitting(cls.page, rows / 4), **changed}

    def watches(self, prompt_tokens: int) -> int:
        return 0  # keys and places alone

    def evict(self, ops: Operations, layer: Layer) -> None:
        self._summarise(ops, layer, len(layer))

    def choose(self, ops: Operations, layer: Layer, query: Handle, query_before: Handle) -> Choice | None:
        if layer.index < self.dense:
            return None
        self._summarise(ops, layer, len(layer))
        pages = layer.notes.get("pages", 0)
        count = max(1, tokens(self.budget, layer.prompt_tokens) // self.page - 1)
        if count >= pages:
            return None
        bounds = ops.total(page_bound(ops, query, layer.notes["high"], layer.notes["low"]), 1)
        newest = torch.arange(pages * self.page, len(layer))
        return Choice(newest, ops.best(bounds, count), 0, self.page)

    def _summarise(self, ops: Operations, layer: Layer, rows: int) -> None:
        """Bounds of the pages that are full and not the newest, once each."""
        done, pages = layer.notes.get("pages", 0), (rows - 1) // self.page
        if layer.index < self.dense or pages <= done:
            return
        for name, bound in zip(("high", "low"), page_ends(ops, layer, range(done, pages), self.page), strict=True):
            note_more(ops, layer, name, ops.fixed(bound), 1)
        layer.notes["pages"] = pages
