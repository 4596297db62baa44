"""Policy ``lazyeviction``: rows that come back into attention after a while are not dropped in between."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction.operations import Handle, Layer, Operations, Seen
from eviction.policy import Policy
from eviction.rows import retain, spread
from eviction.settings import budget, fitting, number, tokens, whole

FAR = 12.0  # sigmoid(-12) is 6e-6; beyond it the score is as good as zero
APART = 2.0**-14  # what an idle time more takes off a score, so that rows beyond it are told apart


@dataclass(frozen=True)
class LazyEviction(Policy):
    """Evicts every ``window`` steps, by how overdue a row's next use is.

    A row is active at a step that gives it a weight above ``alpha``. With TS its last active step and MRI the longest
    it ever lay idle between two, its score at step t is 2 sigmoid(-(t - TS) / MRI) + 2 sigmoid(-1 / MRI): high shortly
    after use, falling slowly for rows that are used rarely. Rows of the last ``window`` steps stay.

    budget: rows after an eviction; up to ``window`` more before the next. alpha: on average over the heads of a group.

    Source: Zhang et al. 2025, section 4; the score as in their equations for the two terms. Deviations: one choice per
    kv head; a row that was never idle counts with MRI = 1, its least value; (t - TS) / MRI is capped at 12 in the
    first term, and 2^-14 of it is taken off the score instead, so that rows whose first term is as good as zero keep
    the order that it would give them; the prompt's rows are active at its last step alone if at all, since activity is
    watched step by step from there.
    """

    budget: float = budget(0.5)
    window: int = whole(175, 1)
    alpha: float = number(1e-4, 0.0, 1.0)

    name: ClassVar[str] = "lazyeviction"
    paper: ClassVar[str] = (
        "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning"
    )
    arxiv: ClassVar[str] = "2506.15969"
    when: ClassVar[str] = "prefill, then every window steps"
    shared_over: ClassVar[str] = "kv head"
    cost: ClassVar[str] = "a comparison and a maximum per row; a top-k and an oblivious compaction every window steps"
    uneven: ClassVar[bool] = True
    style: ClassVar[tuple[str, str, str]] = ("#E69F00", "*", ":")
    uses: ClassVar[tuple[str, ...]] = (
        *("mass", "above", "public", "scale", "multiply", "choose", "largest", "reciprocal", "sigmoid", "within"),
        *("top", "picks", "gather", "keep", "take"),
    )

    @property
    def period(self) -> int:
        """Each step has a row more than the one before, and the last one evicts them."""
        return self.window

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        return {"budget": rows, "window": fitting(cls.window, rows / 4), **changed}

    def watches(self, prompt_tokens: int) -> int:
        return 1

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        last = seen.positions == layer.prompt_tokens - 1
        if last.any():
            heads, rows = layer.kv_heads, seen.weights.shape[-1]
            # Positions are public now, but rows may be moved by a secret later.
            layer.notes["last"] = ops.public(torch.arange(rows).expand(heads, rows) / self._span)
            layer.notes["idle"] = ops.public(torch.full((heads, rows), 1 / self._span))
            self._note(ops, layer, ops.mass(seen.weights, spread(layer, last)), layer.prompt_tokens - 1)

    def evict(self, ops: Operations, layer: Layer) -> None:
        self._shrink(ops, layer, layer.prompt_tokens - 1)

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        now, heads = int(seen.positions[-1]), layer.kv_heads
        for note, value in (("last", now), ("idle", 1)):
            new = ops.public(torch.full((heads, 1), value / self._span))
            layer.notes[note] = ops.cat([layer.notes[note], new], -1)
        self._note(ops, layer, ops.mass(seen.weights, spread(layer, torch.ones(1))), now)
        if (now - layer.prompt_tokens + 1) % self.window == 0:
            self._shrink(ops, layer, now)

    @property
    def _span(self) -> int:
        """Steps that count as 1 in notes: a power of two, so that times are exact on shares."""
        return 1 << (self.window - 1).bit_length()

    def _note(self, ops: Operations, layer: Layer, mass: Handle, now: int) -> None:
        """Last active step and longest idle time, both in spans."""
        active, last, idle = ops.above(mass, self.alpha), layer.notes["last"], layer.notes["idle"]
        age = ops.choose(active, self._since(ops, last, now), _all(ops, last, 0.0))
        layer.notes["last"] = ops.within(ops.add(last, age), now / self._span)
        both = ops.cat([x.reshape(*idle.shape, 1) for x in (idle, age)], -1)
        layer.notes["idle"] = ops.largest(ops.within(both, (now + 1) / self._span), -1)

    def _since(self, ops: Operations, last: Handle, now: int) -> Handle:
        """Time since then, in spans."""
        return ops.add(_all(ops, last, now / self._span), ops.scale(last, -1))

    def _shrink(self, ops: Operations, layer: Layer, now: int) -> None:
        count = tokens(self.budget, layer.prompt_tokens)
        if len(layer) <= count:
            return
        recent = min(self.window, count)
        older = len(layer) - recent
        score = self._score(ops, layer, older, now) if count > recent else None
        retain(ops, layer, score, 0, count - recent, recent, ("last", "idle"))

    def _score(self, ops: Operations, layer: Layer, rows: int, now: int) -> Handle:
        last, idle = layer.notes["last"][..., :rows], layer.notes["idle"][..., :rows]
        inverse = ops.reciprocal(idle, 1 / self._span, (now + 1) / self._span)
        overdue = ops.within(ops.multiply(self._since(ops, last, now), inverse), now + 1)
        near = ops.choose(ops.above(overdue, FAR), _all(ops, last, FAR), overdue)
        terms = [ops.sigmoid(ops.scale(x, -1)) for x in (ops.within(near, FAR), ops.scale(inverse, 1 / self._span))]
        score = ops.scale(ops.add(*terms), 2)
        return ops.within(ops.add(score, ops.scale(overdue, -APART)), 4)


def _all(ops: Operations, like: Handle, value: float) -> Handle:
    """A public number in every place."""
    return ops.public(torch.full(tuple(like.shape), value))
