"""A policy that does what another does and writes down what it saw: rows kept and attended to, and what they draw.

Owns the reading of secrets for debugging. It needs values, so on an engine that keeps secrets it is INSECURE: whoever
makes one must say how a handle is opened (see ``trace``), and tell the user.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from eviction import Policy
    from eviction.operations import Choice, Handle, Layer, Operations, Seen
    from eviction.policy import HeadGroup


@dataclass
class LayerRecord:
    """index: of the layer. which: kv heads of it that these are, () for all. keys [G, P, D]: every key that was made,
    by position. kept: positions [G, N] after the prompt and after each step. attended: by step, positions [G, S]. mass:
    by step, the share of attention over all P keys that these draw, the mean over heads. rows: positions [G, N] of the
    cache's rows now.
    """

    index: int = 0
    which: tuple[int, ...] = ()
    keys: torch.Tensor | None = None
    kept: list[torch.Tensor] = field(default_factory=list)
    attended: list[torch.Tensor] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    rows: torch.Tensor | None = None
    seen: list = field(default_factory=list)

    @property
    def label(self) -> str:
        """The layer, and the heads of it where they are not all."""
        return f"{self.index}" + "".join(f"{' ,'[place > 0]}{head}" for place, head in enumerate(self.which))


Key = tuple[int, tuple[int, ...]]


def _key(layer: Layer) -> Key:
    return layer.index, layer.which


class Recorder:
    """Wraps ``policy``, and is shown all even where that one does not act.

    see(handle): its float tensor, or ``None`` at a party that does not get to know it; it is called in the same order
    at every party. keep_seen: also keep all that the policy was shown (plaintext only).
    """

    acts = True

    def __init__(self, policy: Policy, see: Callable, keep_seen: bool = False) -> None:
        self.policy = policy
        self.see = see
        self.keep_seen = keep_seen
        self.layers: dict[Key, LayerRecord] = {}
        self._choices: dict[Key, Choice | None] = {}
        self._scale: torch.Tensor | None = None  # the policy's ``key_scale``, as last seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    @property
    def in_order(self) -> list[LayerRecord]:
        """Records by layer, and of a layer whose heads are split by its groups."""
        return [self.layers[key] for key in sorted(self.layers)]

    def split(self, layer: Layer) -> tuple[HeadGroup, ...]:
        return tuple(replace(group, policy=self._of(group.policy)) for group in self.policy.split(layer))

    def _of(self, policy: Policy) -> Any:
        """One that records a group's policy with the rest."""
        other = Recorder(policy, self.see, self.keep_seen)
        other.layers = self.layers
        return other

    def begin(self, ops: Operations, layer: Layer) -> None:
        self.layers[_key(layer)] = LayerRecord(layer.index, layer.which)
        self.policy.begin(ops, layer)

    def choose(self, ops: Operations, layer: Layer, query: Handle, query_before: Handle) -> Choice | None:
        choice = self.policy.choose(ops, layer, query, query_before)
        self._choices[_key(layer)] = choice
        return choice

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        self._join(layer, seen)
        self.policy.watch(ops, layer, seen)
        self._find_rows(layer)

    def evict(self, ops: Operations, layer: Layer) -> None:
        self.policy.evict(ops, layer)
        self._find_rows(layer, note=True)

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        self._join(layer, seen)
        self._note_attention(ops, layer, seen)
        self.policy.after_step(ops, layer, seen)
        self._find_rows(layer, note=True)

    def _join(self, layer: Layer, seen: Seen) -> None:
        """New rows have joined the cache and nothing has been dropped yet."""
        record, key = self.layers[_key(layer)], self._as_made(layer, self.see(seen.key))
        if self.keep_seen:
            record.seen.append(seen)
        if key is None:
            return
        record.keys = key if record.keys is None else torch.cat([record.keys, key], 1)
        if layer.positions is not None:  # rows may have left a window since
            record.rows = layer.positions.expand(len(key), -1)
            return
        new = seen.positions.expand(len(key), -1)
        record.rows = new if record.rows is None else torch.cat([record.rows, new], 1)

    def _note_attention(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        choice, record = self._choices.pop(_key(layer), None), self.layers[_key(layer)]
        picks = None if choice is None or choice.picks is None else self.see(choice.picks)
        query = self.see(seen.query)
        if query is None:
            return
        if self._scale is not None:
            query = query / self._scale
        assert record.rows is not None, "the new row has joined"
        attended = (
            record.rows if choice is None else record.rows.gather(1, chosen_rows(choice, picks, len(record.rows)))
        )
        scores = torch.einsum("gmd,gpd->gmp", query, record.keys) * math.log(ops.softmax_base)
        weights = scores.softmax(-1).mean(1)
        record.attended.append(attended)
        record.mass.append(weights.gather(1, attended).sum(1).mean().item())

    def _find_rows(self, layer: Layer, note: bool = False) -> None:
        """Which position each row of the cache came from: its nearest key, since coarse rows and shares are rounded."""
        record, rows = self.layers[_key(layer)], self._as_made(layer, self.see(layer.keys))
        if rows is None:
            return
        assert record.keys is not None, "what is in the cache was made"
        record.rows = torch.cdist(rows.double(), record.keys.double()).argmin(-1)
        if note:
            record.kept.append(record.rows)

    def _as_made(self, layer: Layer, keys: torch.Tensor | None) -> torch.Tensor | None:
        """Keys as the model made them, where a policy has others in the cache."""
        scale = self.policy.key_scale(layer)
        self._scale = None if scale is None else self.see(scale)
        return keys if keys is None or self._scale is None else keys * self._scale


def chosen_rows(choice: Choice, picks: torch.Tensor | None, heads: int) -> torch.Tensor:
    """Row indices [G, S] that a choice attends to, sorted; picks: its one-hot rows as numbers."""
    rows = choice.rows.expand(heads, -1)
    if picks is not None:
        starts = choice.first + picks.argmax(-1) * choice.size
        blocks = (starts[..., None] + torch.arange(choice.size)).flatten(1)
        rows = torch.cat([rows, blocks.expand(heads, -1)], 1)
    return rows.sort(1).values
