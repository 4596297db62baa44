"""The KV cache: rows of keys and values as handles, and what an eviction policy knows of them.

Owns what is kept between steps, and when a policy's hooks are called; one that does not act is shown nothing. A row's
position (which RoPE used when the key was made) is apart from its index, so that rows can be dropped without touching
the others: a policy's, and those that have left a layer's window for good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from crypten_llm.errors import UsageError
from eviction import FULL, Policy, PolicyError
from eviction.operations import Layer, Seen, no_rotary
from eviction.rows import take

if TYPE_CHECKING:
    from crypten_llm.engines.base import Engine
    from crypten_llm.models.windows import Windows
    from eviction.operations import Choice, Handle, Operations
    from eviction.policy import HeadGroup

    class Able(Engine, Operations):
        """An engine that has what the policy in use asks for."""


def causal_mask(rows: int, length: int, window: int | None = None, sinks: int = 0) -> torch.Tensor:
    """Public bool [rows, length]: the last ``rows`` of ``length`` cached rows, each seeing itself and those before.

    window: how many of them, itself among them, it sees; ``None`` for all. sinks: rows at the beginning that are seen
    beyond that.
    """
    before = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    if window is None:
        return before
    near = before.triu(length - rows - window + 1)
    near[:, :sinks] = before[:, :sinks]
    return near


class LayerCache:
    """One layer's rows: ``keys`` and ``values`` [kv_heads, N, head_dim]; ``policy`` says which of them stay.

    window: how many tokens, its own among them, a token of this layer sees; ``None`` for all. sinks: tokens at the
    beginning that it sees beyond them.

    Under a policy that splits a layer's heads it has no rows itself: ``parts`` have, one for each group of kv heads.
    """

    def __init__(
        self,
        engine: Engine,
        keys: Handle = None,
        values: Handle = None,
        layer: Layer | None = None,
        policy: Policy = FULL,
        window: int | None = None,
        sinks: int = 0,
    ) -> None:
        self.engine = cast("Able", engine)  # ``check_policy`` makes sure of it
        self.layer = Layer(0, 1, 0, 0, 0, 0) if layer is None else layer
        self.layer.keys, self.layer.values = keys, values
        self.policy = policy
        self.window, self.sinks = window, sinks
        self._groups: list[LayerCache] = []
        self.places: Any = None  # of padded rows
        self.prefilled = False
        self._seen = 0

    def copy(self, before: Layer | None = None) -> LayerCache:
        """The same rows and notes, to go on with apart; ``before``: the copy of the layer below."""
        return self.handed_to(self.policy, self.layer.notes, before)

    def handed_to(self, policy: Policy, notes: dict, before: Layer | None = None) -> LayerCache:
        """A copy that another policy goes on with; notes: what it has noted of these rows."""
        layer = replace(self.layer, notes=dict(notes), before=before)
        other = LayerCache(self.engine, self.keys, self.values, layer, policy, self.window, self.sinks)
        if self.is_split:
            other._groups = [part.copy() for part in self.parts]
        other.prefilled, other._seen = self.prefilled, self._seen
        return other

    @property
    def keys(self) -> Handle:
        return self.layer.keys

    @property
    def values(self) -> Handle:
        return self.layer.values

    def __len__(self) -> int:
        return 0 if self.layer.keys is None else self.layer.keys.shape[1]

    @property
    def label(self) -> str:
        return f"layer {self.layer.index}"

    @property
    def is_split(self) -> bool:
        """Whether ``parts`` have the rows."""
        return bool(self._groups)

    @property
    def parts(self) -> list[LayerCache]:
        """The caches that have the rows: of each group of heads, or this one."""
        return self._groups or [self]  # not kept, or a cache would hold itself, and its memory until it is looked for

    def follow(self, policy: Policy, prompt_tokens: int) -> None:
        """Sets the policy for a prompt of this length. Raises PolicyError where it does not fit the model, UsageError
        where its groups of heads would begin with rows that are there."""
        self.policy, self.layer.prompt_tokens = policy, prompt_tokens
        groups = policy.split(self.layer)
        if groups and len(self):
            raise UsageError(f"policy {policy.name} begins with an empty cache, but this one has {len(self)} rows")
        self._groups = [self._part(group) for group in groups]
        for part in self.parts:
            part.policy.begin(part.engine, part.layer)

    def _part(self, group: HeadGroup) -> LayerCache:
        """An empty cache of some of the kv heads."""
        count = len(group.heads)
        layer = replace(self.layer, heads=count * self.layer.group, kv_heads=count, which=group.heads, notes={})
        layer.before = None
        return LayerCache(self.engine, None, None, layer, group.policy, group.window, group.sinks)

    def in_order(self, mixed: list[Handle]) -> Handle:
        """What each part gives, [its heads, T, head_dim], as [heads, T, head_dim] in the model's order."""
        if not self.is_split:
            return mixed[0]
        place = torch.arange(self.layer.heads).reshape(self.layer.kv_heads, -1)
        order = torch.cat([place[list(part.layer.which)].flatten() for part in self.parts])
        return (self.engine.cat(mixed, 0) if len(mixed) > 1 else mixed[0])[order.argsort()]

    def slide(self) -> None:
        """Drops the rows that no token to come sees; to be called before the next ones join."""
        for part in self.parts:
            part._slide()

    def _slide(self) -> None:
        if self.window is None or len(self) < self.sinks + self.window:
            return
        if self.policy.acts and not self.layer.which:  # which ``Plan.check`` has found at a client of this program
            raise UsageError(f"policy {self.policy.name} needs all rows, but the layer's window is {self.window}")
        index = torch.arange(len(self))
        take(self.engine, self.layer, torch.cat([index[: self.sinks], index[len(self) - self.window + 1 :]]))

    def mask(self, rows: int) -> Any:
        """Which rows each of the last ``rows`` sees, see ``causal_mask``; ``None`` where a single one sees all, and of
        padded rows, which a single one is behind, their places.
        """
        return causal_mask(rows, len(self), self.window, self.sinks) if rows > 1 else self.places

    def append(self, keys: Handle, values: Handle) -> None:
        """Adds rows [kv_heads, T, head_dim] at the end."""
        layer, positions = self.layer, torch.arange(self._seen, self._seen + keys.shape[1])
        if layer.keys is None:
            layer.keys, layer.values, layer.positions = keys, values, positions
        else:
            layer.keys = self.engine.cat([layer.keys, keys], 1)
            layer.values = self.engine.cat([layer.values, values], 1)
            if layer.positions is not None:
                layer.positions = torch.cat([layer.positions, positions])
        self._seen += len(positions)

    def enter_known(self, keys: Handle, values: Handle, seen: int) -> None:
        """Adds the last rows of the first ``seen`` tokens to an empty cache; the policy is not shown them."""
        self._seen = seen - keys.shape[1]
        self.append(keys, values)

    def enter(self, query: Handle, key: Handle, value: Handle) -> tuple[Handle, Handle, Handle]:
        """The rotated query [heads, T, head_dim] and the rows [kv_heads, T, head_dim] as attention will use them."""
        if self.policy.acts:
            return self.policy.enter(self.engine, self.layer, query, key, value)
        return query, key, value

    def leave(self, mixed: Handle) -> Handle:
        """The mixed values [kv_heads, group * T, head_dim] as the model goes on with them."""
        return self.policy.leave(self.engine, self.layer, mixed) if self.policy.acts else mixed

    def choose(self, query: Handle, query_before: Handle) -> Choice | None:
        """What a decode step attends to; ``None`` for all rows.

        query: [kv_heads, group, head_dim]. query_before: [heads, 1, head_dim], before the rotary embedding.
        """
        if self.prefilled and self.policy.acts:
            with self.engine.meter.operation(f"{self.label} selection", "selection"):
                return self.policy.choose(self.engine, self.layer, query, self._grouped(query_before))
        return None

    def show(self, rows: int, query_before: Handle, **handles: Handle) -> None:
        """Shows the policy a pass of ``rows`` new rows.

        query_before: [heads, T, head_dim], before the rotary embedding. handles: the rest of ``Seen``.
        """
        if self.policy.acts:
            positions = torch.arange(self._seen - rows, self._seen)
            seen = Seen(positions=positions, query_before=self._grouped(query_before), **handles)
            self._evict(self.policy.after_step if self.prefilled else self.policy.watch, seen)

    def _grouped(self, query: Handle) -> Handle:
        """[heads, T, head_dim] to [kv_heads, group * T, head_dim]."""
        return query.reshape(self.layer.kv_heads, -1, self.layer.head_dim)

    def _evict(self, hook: Callable, *shown: Handle) -> None:
        with self.engine.meter.operation(f"{self.label} eviction", "eviction"):
            hook(self.engine, self.layer, *shown)

    def show_last(self, query: Handle) -> None:
        """As if the rows were a prompt's of which the policy sees the last query [kv_heads, group, head_dim] alone.

        Before the rotary embedding it is every row's query.
        """
        engine, layer, rows = self.engine, self.layer, len(self)
        self._seen, layer.positions = rows, torch.arange(rows)
        every = query.reshape(layer.heads, 1, layer.head_dim)[:, torch.zeros(rows, dtype=torch.int64)]
        scores = engine.scores(query, self.keys)
        weights = engine.softmax(scores)
        engine.mix(weights, self.values)
        keys, values = self.engine.contents(self.keys), self.engine.contents(self.values)
        made = {"key": keys, "value": values, "key_before": keys, "query_before": every}
        self.show(1, query=query, scores=scores, weights=weights, **made)

    def go_on(self, prompt_tokens: int, turn_tokens: int) -> None:
        """Before a further turn of ``turn_tokens``, with which the conversation has ``prompt_tokens`` in all."""
        for part in self.parts:
            part.prefilled, part.layer.prompt_tokens = False, prompt_tokens
            part.policy.go_on(part.engine, part.layer, turn_tokens)

    def end_prompt(self) -> None:
        """Has the policy evict what the prompt left."""
        self.slide()
        for part in self.parts:
            part.prefilled = True
            if part.policy.acts:
                part._evict(part.policy.evict)


class Stretch(NamedTuple):
    """The rows of a pass that are one sequence's: as many, which join its cache of the layer that they are in."""

    cache: LayerCache
    rows: int


@dataclass
class KVCache:
    """All layers' rows. ``length`` counts the tokens seen, which is the position of the next one."""

    layers: list[LayerCache] = field(default_factory=list)
    length: int = 0

    @classmethod
    def empty(
        cls,
        engine: Engine,
        layers: int,
        heads: int = 0,
        kv_heads: int = 0,
        head_dim: int = 0,
        windows: Windows = (),
        rotary: Callable = no_rotary,
    ) -> KVCache:
        """A cache that keeps everything that its layers' windows, if there are any, do not leave behind; a policy needs
        the sizes, and may need ``rotary`` (``Layer``)."""
        of_all: dict = {"common": {}, "rotary": rotary}
        caches = [
            LayerCache(engine, layer=Layer(i, layers, 0, heads, kv_heads, head_dim, **of_all), window=window)
            for i, window in enumerate(windows or (None,) * layers)
        ]
        for below, cache in zip(caches, caches[1:], strict=False):
            cache.layer.before = below.layer
        return cls(caches)

    def follow(self, policy: Policy, prompt_tokens: int) -> None:
        """Sets the policy for a prompt of this length, before its first token.

        Raises UsageError when the engine lacks an operation of the policy, or the policy does not fit the model.
        """
        for cache in self.layers:
            cache.engine.check_policy(policy)
            try:
                cache.follow(policy, prompt_tokens)
            except PolicyError as error:
                raise UsageError(str(error)) from None

    def begin_with(self, rows: Sequence[tuple[Handle, Handle]], count: int) -> None:
        """Enters the keys and values of the first ``count`` tokens, by layer: those that its window leaves of them."""
        if self.length:
            raise UsageError(f"a public prefix comes first, but the cache has {self.length} rows")
        for cache, (keys, values) in zip(self.layers, rows, strict=True):
            cache.enter_known(keys, values, count)
        self.length = count

    def end_prompt(self) -> None:
        """To be called when the whole prompt has been seen."""
        for cache in self.layers:
            cache.end_prompt()

    def extend(self, count: int) -> torch.Tensor:
        """Positions [count] of the next ``count`` tokens, which are now counted as seen."""
        positions = torch.arange(self.length, self.length + count)
        self.length += count
        return positions
