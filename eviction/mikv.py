"""Policy ``mikv``: nothing is dropped; rows that matter less are kept with fewer bits."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction.operations import Handle, Layer, Operations, Seen
from eviction.policy import Policy
from eviction.rows import add_mass, spread, without
from eviction.settings import budget, number, tokens, whole


@dataclass(frozen=True)
class MiKV(Policy):
    """Mixed precision. The rows that drew most attention, and the recent ones, stay as they are; all others are rounded
    to ``bits`` bits a number. The cache holds the rounded rows first, in order of eviction, then the others.

    Channels are balanced first, so that rounding serves all of them alike: at the end of the prompt each coordinate of
    the keys and of the values is divided by its largest magnitude there. Queries and mixed values are multiplied by it.

    important: rows kept in full precision; a prompt that has no more stays as it is, and so does its answer. recent: of
    these, the last rows. limit: no key or value exceeds it, and some row reaches 1 / limit in each coordinate.

    It saves memory where an engine holds ``coarse`` rows in fewer bits; attention still runs over all rows.

    Source: Yang et al. 2024, section 3. Deviations: one choice per kv head (mean over its query heads); the balancer is
    the keys' and values' own largest magnitude, where the paper balances keys against queries with a square root and
    rounds each token in its own range; levels are symmetric around zero.
    """

    important: float = budget(0.25)
    recent: float = budget(0.1, zero=True)
    bits: int = whole(4, 2, 8)
    limit: float = number(16.0, 1.0, 64.0)

    name: ClassVar[str] = "mikv"
    paper: ClassVar[str] = (
        "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization"
    )
    arxiv: ClassVar[str] = "2402.18096"
    when: ClassVar[str] = "prefill and step"
    shared_over: ClassVar[str] = "kv head"
    cost: ClassVar[str] = "attention over all rows, a minimum over the important ones, one row made coarse"
    rebuilds_cache: ClassVar[bool] = True
    budget_means: ClassVar[str] = "reads all rows and keeps the budget's in full precision"
    style: ClassVar[tuple[str, str, str]] = ("#000000", "+", ":")
    uses: ClassVar[tuple[str, ...]] = (
        *("mass", "contents", "fixed", "public", "scale", "largest", "reciprocal", "multiply", "coarse", "within"),
        *("top", "picks", "keep", "take", "drop", "transform", "choose", "gather"),
    )

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        """Rows that keep their precision; all others are read as well."""
        return {"important": rows, "recent": max(2, 2 * rows // 5), **changed}

    def key_scale(self, layer: Layer) -> Handle | None:
        return layer.notes.get("key range")

    def enter(
        self, ops: Operations, layer: Layer, query: Handle, key: Handle, value: Handle
    ) -> tuple[Handle, Handle, Handle]:
        if "key range" not in layer.notes:
            return query, key, value
        ranges = layer.notes["key range"]
        wide = ops.multiply(query.reshape(layer.kv_heads, -1, layer.head_dim), ranges)
        query = wide.reshape(*query.shape)
        key, value = (
            ops.within(ops.multiply(part, layer.notes[f"{name} inverse"]), self.limit**2)
            for name, part in (("key", key), ("value", value))
        )
        return query, key, value

    def leave(self, ops: Operations, layer: Layer, mixed: Handle) -> Handle:
        ranges = layer.notes.get("value range")
        return mixed if ranges is None else ops.multiply(mixed, ranges)

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        mass = ops.mass(seen.weights, spread(layer, torch.ones(len(seen.positions))))
        add_mass(ops, layer.notes, mass, limit=int(seen.positions[-1]) + 1)

    def evict(self, ops: Operations, layer: Layer) -> None:
        important, recent = self._sizes(layer)
        if len(layer) <= important:
            return
        self._balance(ops, layer)
        rows = len(layer)
        older, best = rows - recent, important - recent
        mass, index = layer.notes["mass"][..., :older], torch.arange(rows)
        most = ops.top(mass, best)  # compared once: a row is one of these or one of the others, whatever ties there are
        least = ops.picks(ops.add(ops.public(torch.ones(most.shape)), ops.scale(most, -1)), older - best)
        most = ops.picks(most, best) if best else None
        for name in ("keys", "values"):
            stored = getattr(layer, name)
            old = ops.take(stored, index[:older])
            parts = [ops.coarse(ops.keep(old, least), self.bits)]
            parts += [ops.keep(old, most)] if best else []
            parts += [ops.take(stored, index[older:])] if recent else []
            setattr(layer, name, ops.cat(parts, 1))
        heads = layer.kv_heads
        parts = [ops.gather(most, mass.reshape(heads, older, 1)).reshape(heads, best)] if best else []
        parts += [layer.notes["mass"][..., older:]] if recent else []
        layer.notes["mass"] = parts[0] if len(parts) == 1 else ops.cat(parts, -1)
        layer.notes["coarse"], layer.positions = rows - important, None

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        if "coarse" not in layer.notes:
            return
        important, recent = self._sizes(layer)
        coarse, index = layer.notes["coarse"], torch.arange(len(layer))
        drawn = ops.mass(seen.weights, spread(layer, torch.ones(1)))
        add_mass(ops, layer.notes, drawn[..., coarse:], limit=int(seen.positions[-1]) + 1)
        older = len(layer) - coarse - recent
        mass = layer.notes["mass"][..., :older]
        least = ops.top(ops.scale(mass, -1), 1)
        one = least.reshape(layer.kv_heads, 1, older)
        for name in ("keys", "values"):
            stored = getattr(layer, name)
            fine = ops.take(stored, index[coarse : coarse + older])
            parts = [ops.take(stored, index[:coarse]), ops.coarse(ops.keep(fine, one), self.bits)]
            parts += [ops.drop(fine, least)] if older > 1 else []
            parts += [ops.take(stored, index[coarse + older :])] if recent else []
            setattr(layer, name, ops.cat(parts, 1))
        layer.notes["mass"] = without(ops, layer.notes["mass"], least)
        layer.notes["coarse"] = coarse + 1

    def _balance(self, ops: Operations, layer: Layer) -> None:
        """Divides each coordinate of the rows by its largest magnitude."""
        for name in ("key", "value"):
            rows = ops.contents(getattr(layer, f"{name}s"))
            heads, count, dim = rows.shape
            both = ops.largest(ops.cat([rows, ops.scale(rows, -1)], 1), 1).reshape(heads, 1, dim)
            inverse = ops.reciprocal(both, 1 / self.limit, self.limit)
            layer.notes[f"{name} range"], layer.notes[f"{name} inverse"] = both, inverse
            setattr(layer, f"{name}s", ops.fixed(ops.within(ops.multiply(rows, inverse), 1), name == "value"))

    def _sizes(self, layer: Layer) -> tuple[int, int]:
        recent = tokens(self.recent, layer.prompt_tokens)
        important = max(tokens(self.important, layer.prompt_tokens), recent + 1)
        return important, recent
