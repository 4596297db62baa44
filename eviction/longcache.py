"""Policy ``longcache``: tokens found by their content alone, before positions are put on, and their neighbours."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction.operations import Choice, Handle, Layer, Operations, Seen
from eviction.policy import Policy
from eviction.rows import note_more
from eviction.settings import fitting, whole

APART = 2.0**-10  # between the scores of two spans that are alike: more than shares are off


@dataclass(frozen=True)
class LongCache(Policy):
    """Keeps all rows. A step attends to the first ``sinks`` rows, the last ``local`` ones, and spans of ``span`` rows
    between them that hold a key with a high product with an unrotated query.

    top: rows that each query head may ask for.

    Source: Liu et al. 2024 (first named LongCache, later ReAttention), section 3. Deviations: the paper takes the union
    of the heads' best rows and widens each by ``span``, which is a data-dependent count; here the rows between sinks
    and window are cut into spans, a span counts as its best row for any head, and the best top * heads spans are
    taken, as many as the union can have. Of spans that are alike, as those of one word are in the first layer, the
    first is taken: a little is taken off a later one's score, 1/4 at most. Keys keep the position they had in the text.
    """

    top: int = whole(4, 1)
    span: int = whole(32, 1)
    sinks: int = whole(32, 0)
    local: int = whole(4096, 1)

    name: ClassVar[str] = "longcache"
    paper: ClassVar[str] = (
        "Farewell to Length Extrapolation, a Training-Free Infinite Context with Finite Attention Scope"
    )
    arxiv: ClassVar[str] = "2407.15176"
    when: ClassVar[str] = "step"
    shared_over: ClassVar[str] = "layer"
    cost: ClassVar[str] = "a second product over the cache, a maximum over span and heads, a top-k over spans"
    goes_on: ClassVar[bool] = True
    style: ClassVar[tuple[str, str, str]] = ("#56B4E9", "v", "--")
    uses: ClassVar[tuple[str, ...]] = (
        *("fixed", "take", "largest", "public", "best"),
        *("gather_scores", "scatter_weights"),
    )

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        """Each head may ask for one span; together they get half of the rows."""
        span, sinks = max(1, fitting(cls.span, rows / 2 / heads)), max(1, min(4, rows // 8))
        local = max(1, rows - sinks - heads * span - span // 2)
        return {"top": 1, "span": span, "sinks": sinks, "local": local, **changed}

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        note_more(ops, layer, "keys", ops.fixed(seen.key_before), 1)

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        self.watch(ops, layer, seen)

    def choose(self, ops: Operations, layer: Layer, query: Handle, query_before: Handle) -> Choice | None:
        spans = max(0, (len(layer) - self.local - self.sinks) // self.span)
        count = self.top * layer.heads
        if count >= spans:
            return None
        rows = torch.arange(len(layer))
        between = rows[self.sinks : self.sinks + spans * self.span]
        found = ops.scores(query_before, ops.take(layer.notes["keys"], between))
        heads, group = found.shape[:2]
        found = found.reshape(heads, group, spans, self.span).permute(2, 0, 1, 3)
        best = ops.largest(found.reshape(1, spans, heads * group * self.span), 2)
        best = ops.add(best, ops.public(-torch.arange(spans)[None] * _apart(spans)))
        public = torch.cat([rows[: self.sinks], rows[self.sinks + spans * self.span :]])
        return Choice(public, ops.best(best, count), self.sinks, self.span)


def _apart(spans: int) -> float:
    """``APART``, or the power of two that keeps all of them within 1/4."""
    return min(APART, 2.0 ** -(spans.bit_length() + 2))
