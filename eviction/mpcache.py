"""Policy ``mpcache``: half of the prompt is dropped once, and each step attends to a few clusters of what is left.

The policy made for secret shares: what is costly there (comparisons, and moving rows by secret indices) is done once
per prompt, or on a handful of clusters.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction.operations import Choice, Handle, Layer, Operations, Seen
from eviction.policy import Policy
from eviction.quest import page_bound
from eviction.rows import add_mass, over_heads, retain, spread
from eviction.settings import budget, fitting, number, one_of, share, switch, tokens, whole

LONG = 24_000  # prompts above this many tokens look at the shorter window


@dataclass(frozen=True)
class MPCache(Policy):
    """Static eviction after the prompt, then dynamic selection of clusters in two levels.

    Static: a row's score is the attention that the last ``window`` of the prompt's queries gave it (``long_window``
    above 24,000 tokens), the mean over all heads; the ``static`` best rows of a layer stay, and the last ``coarse``
    rows. Dynamic: rows are cut into clusters of ``coarse`` and these into clusters of ``fine``. A cluster's key is
    alpha * (its largest) + (1 - alpha) * (its least) value of each coordinate, so its likeness to a query is one
    product. The ``first`` likeliest coarse clusters are opened up, and of their fine ones as many are attended to as
    make up ``second`` of all. The first cluster and the newest, which grows until it is full, always are. share:
    whether layers go in pairs from layer ``share_from`` on, the second attending to the clusters that the first chose;
    the last ``alone`` layers do not. least: a cache of fewer rows is attended to whole, since choosing from it costs
    more than it saves. summary: ``minmax`` as published; ``mean``, the mean key, needs no comparison; ``bound``,
    Quest's largest possible score, takes a comparison per coordinate of the query at each step. reference: the static
    choice of the authors' code, for comparison on plaintext: scores without 1/sqrt(head_dim) and without a causal
    mask, and every row that any query of the window gives at least ``threshold`` stays. How many those are depends on
    the data, so engines that keep secrets refuse it.

    Source: Zeng et al. 2025, sections 4.2 to 4.5, and the authors' code (github.com/zwxandy/MPCache). Deviations: the
    static count is public, where the authors compare with a threshold; the static score is the sum of attention, not
    the number of queries that exceed the threshold; clusters of 64 and 32 rows, theirs have 32 and 16: as accurate
    here with fewer comparisons (docs/baselines.md); no selection below ``least`` rows; the always attended clusters
    are the first ``fine`` rows and the newest coarse cluster (at most ``coarse`` rows), between them clusters are
    full; one choice per kv head, likeness added over its query heads; ``reference`` covers the static choice alone.
    """

    static: float = budget(0.5)
    window: float = share(0.2)
    long_window: float = share(0.1)
    alpha: float = number(0.6, 0.0, 1.0)
    coarse: int = whole(64, 2)
    fine: int = whole(32, 1)
    first: float = share(0.5)
    second: float = share(0.2)
    least: int = whole(384, 0)
    summary: str = one_of("minmax", "minmax", "mean", "bound")
    share: bool = switch(True)
    share_from: int = whole(2, 0)
    alone: int = whole(2, 0)
    reference: bool = switch(False)
    threshold: float = number(1e-4, 0.0, 1.0)

    name: ClassVar[str] = "mpcache"
    paper: ClassVar[str] = "MPCache: MPC-Friendly KV Cache Eviction for Efficient Private LLM Inference"
    arxiv: ClassVar[str] = "2501.06807"
    when: ClassVar[str] = "prefill and step"
    shared_over: ClassVar[str] = "layer (static), kv head and pairs of layers (dynamic)"
    cost: ClassVar[str] = "a product over clusters and two small top-k, every other layer none"
    # A search weighs itself what `least` weighs; the others act on very long prompts, and on plaintext alone.
    held: ClassVar[dict] = {"least": 0, "long_window": None, "reference": None, "threshold": None}
    style: ClassVar[tuple[str, str, str]] = ("#D55E00", "o", "--")
    uses: ClassVar[tuple[str, ...]] = (
        *("mass", "within", "total", "scale", "top", "picks", "keep", "take", "contents", "largest", "fixed"),
        *("best", "gather", "transform", "gather_scores", "scatter_weights"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coarse % self.fine:
            raise self.refuse(f"coarse is {self.coarse}; it must be a multiple of fine, which is {self.fine}")

    @property
    def period(self) -> int:
        return self.coarse if self.second < 1 else 1

    def fills(self, prompt_tokens: int) -> bool:
        return (tokens(self.static, prompt_tokens) - self.fine) % self.coarse == 0

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        """It keeps half of the prompt, or the root of the budget where that is more, and chooses clusters among them.

        The first cluster and the newest one, half full on average, are always read, and count. With ``second`` of 1
        nothing is chosen, and what is kept is the budget.
        """
        if changed.get("second") == 1:
            return {"static": rows / prompt_tokens, **changed}
        coarse = fitting(cls.coarse, rows / 2)
        sizes = {"coarse": coarse, "fine": max(1, coarse * cls.fine // cls.coarse)}
        found = {"static": round(max(0.5, (rows / prompt_tokens) ** 0.5), 4), **sizes, "least": 0, **changed}
        count = max(1, round((rows - found["fine"] - (found["coarse"] + 1) / 2) / found["fine"]))
        # Half a cluster more, so that the policy's rounding down gives this count while the cache grows.
        second = min(1.0, round((count + 0.5) * found["fine"] / (found["static"] * prompt_tokens), 4))
        return {"second": second, **found}

    def idle(self) -> set[str]:
        found = {"window"} if self.static == 1 else set()
        if self.second == 1:
            found |= {"alpha", "first", "summary", "share", "share_from", "alone"}
        if self.summary != "minmax":
            found.add("alpha")
        if self.coarse == self.fine:
            found.add("first")
        if not self.share:
            found |= {"share_from", "alone"}
        return found

    def begin(self, ops: Operations, layer: Layer) -> None:
        if self.reference and ops.is_private:
            raise self.refuse("reference keeps a number of rows that depends on the data; run it on engine 'plain'")

    # Static eviction.

    def watches(self, prompt_tokens: int) -> int:
        return max(1, int(prompt_tokens * (self.long_window if prompt_tokens > LONG else self.window)))

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        window = self.watches(layer.prompt_tokens)
        rows = seen.positions >= layer.prompt_tokens - window
        if not rows.any():
            return
        if self.reference:
            queries = seen.query.reshape(layer.kv_heads, layer.group, len(rows), layer.head_dim)[:, :, rows]
            before = layer.notes.get("queries")
            layer.notes["queries"] = queries if before is None else ops.cat([before, queries], 2)
        else:
            add_mass(ops, layer.notes, ops.mass(seen.weights, spread(layer, rows)), limit=window)

    def evict(self, ops: Operations, layer: Layer) -> None:
        if self.reference:
            self._evict_as_published(ops, layer)
        else:
            mass, kept = over_heads(ops, layer.notes.pop("mass")), self.kept(layer)
            if kept < len(layer):
                last = min(self.coarse, kept)
                retain(ops, layer, mass[..., : len(layer) - last], 0, kept - last, last)
        self._summarise(ops, layer)

    def kept(self, layer: Layer) -> int:
        """Rows of the prompt that outlive it."""
        return tokens(self.static, layer.prompt_tokens)

    def _evict_as_published(self, ops: Operations, layer: Layer) -> None:
        queries = layer.notes.pop("queries") * math.sqrt(layer.head_dim)
        weights = (queries @ layer.keys[:, None].transpose(-1, -2)).softmax(-1)
        weights = weights.reshape(-1, *weights.shape[-2:]).mean(0)
        kept = (weights >= self.threshold).any(0).nonzero()[:, 0]
        layer.keys, layer.values = ops.take(layer.keys, kept), ops.take(layer.values, kept)
        assert layer.positions is not None, "a prompt's rows are as they came"
        layer.positions = layer.positions[kept]

    # Dynamic selection.

    def selects(self, layer: Layer) -> bool:
        """Whether a query is compared with clusters at all; else every row is attended to."""
        return self.second < 1 and len(layer) >= self.least

    def follows(self, layer: Layer) -> bool:
        """Whether a layer attends to what the layer below chose; none does where each keeps other rows."""
        index, shares = layer.index - self.share_from, self.share and not self.reference
        return shares and index > 0 and index % 2 == 1 and layer.index < layer.layers - self.alone

    def choose(self, ops: Operations, layer: Layer, query: Handle, query_before: Handle) -> Choice | None:
        self._summarise(ops, layer)
        if self.follows(layer):
            assert layer.before is not None, "the first layer follows none"
            if len(layer.before) == len(layer):
                return layer.before.notes["choice"]
        layer.notes["choice"] = choice = self._select(ops, layer, query)
        return choice

    def _select(self, ops: Operations, layer: Layer, query: Handle) -> Choice | None:
        if not self.selects(layer):
            return None
        closed, parts = layer.notes.get("closed", 0), self.coarse // self.fine
        opened = max(1, int(closed * self.first))
        count = max(1, int(len(layer) / self.fine * self.second))
        if count >= closed * parts:
            return None
        if opened * parts < count:
            opened = -(-count // parts)
        heads = layer.kv_heads
        likeness = self._likeness(ops, layer, query, "fine")
        if opened < closed and parts > 1:
            coarse = self._likeness(ops, layer, query, "coarse")
            chosen = ops.best(coarse, opened)
            inner = ops.gather(chosen, likeness.reshape(heads, closed, parts)).reshape(heads, opened * parts)
            picks = ops.gather(ops.best(inner, count), self._parts(ops, chosen))
        else:
            picks = ops.best(likeness, count)
        rows = torch.arange(len(layer))
        public = torch.cat([rows[: self.fine], rows[self.fine + closed * self.coarse :]])
        return Choice(public, picks, self.fine, self.fine)

    def _likeness(self, ops: Operations, layer: Layer, query: Handle, level: str) -> Handle:
        """[G, C], added over the heads of a group."""
        if self.summary == "bound":
            return ops.total(page_bound(ops, query, layer.notes[level], layer.notes[f"{level} low"]), 1)
        return ops.total(ops.scores(query, layer.notes[level]), 1)

    def _parts(self, ops: Operations, chosen: Handle) -> Handle:
        """One-hot coarse clusters [G, k, C] as their fine ones [G, k * parts, C * parts], in order."""
        (heads, count, closed), parts = chosen.shape, self.coarse // self.fine
        wide = []
        for part in range(parts):
            matrix = torch.zeros(closed, closed * parts)
            matrix[torch.arange(closed), torch.arange(closed) * parts + part] = 1
            wide.append(ops.transform(chosen, matrix).reshape(heads, count, 1, closed * parts))
        return ops.cat(wide, 2).reshape(heads, count * parts, closed * parts)

    def _summarise(self, ops: Operations, layer: Layer) -> None:
        """Keys of the coarse clusters that are full and not the newest, and of their fine ones, once each."""
        if not self.selects(layer):
            return
        done, closed = layer.notes.get("closed", 0), max(0, (len(layer) - self.fine - 1) // self.coarse)
        if closed <= done:
            return
        start, stop, parts = self.fine + done * self.coarse, self.fine + closed * self.coarse, self.coarse // self.fine
        layer.notes["closed"] = closed
        if self.follows(layer):
            return
        heads, dim = layer.kv_heads, layer.head_dim
        keys = ops.contents(ops.take(layer.keys, torch.arange(start, stop)))
        keys = keys.reshape(heads, (closed - done) * parts, self.fine, dim)
        shape = (heads, closed - done, parts, dim)
        if self.summary == "mean":
            fine = ops.scale(ops.total(keys, 2), 1 / self.fine)
            made = {"fine": fine, "coarse": ops.scale(ops.total(fine.reshape(*shape), 2), 1 / parts)}
        else:
            ends = [ops.largest(keys, 2), ops.largest(ops.scale(keys, -1), 2)]  # the least negated
            wide = [ops.largest(end.reshape(*shape), 2) if parts > 1 else end for end in ends]
            made = self._summaries(ops, "fine", *ends) | self._summaries(ops, "coarse", *wide)
        for name, summary in made.items():
            summary = ops.fixed(summary)
            layer.notes[name] = ops.cat([layer.notes[name], summary], 1) if done else summary

    def _summaries(self, ops: Operations, level: str, high: Handle, least: Handle) -> dict:
        """What stands for clusters with these largest and negated least values."""
        if self.summary == "bound":
            return {level: high, f"{level} low": ops.scale(least, -1)}
        return {level: ops.add(ops.scale(high, self.alpha), ops.scale(least, self.alpha - 1))}
